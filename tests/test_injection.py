"""The text of an injection: what it means, and one clear line where it is wrong."""

import pytest

from elaswave.core.ids import Step, WorkerId
from elaswave.core.injection import DEFAULT_FACTOR, Injection, parse_injection
from elaswave.errors import ConfigError


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        (
            "kill:worker=3,step=7,phase=backward",
            Injection(action="kill", worker=WorkerId(3), step=Step(7), phase="backward"),
        ),
        (
            "stop:during=recovery,phase=any,step=0,worker=0",
            Injection(action="stop", worker=WorkerId(0), step=Step(0), during_recovery=True),
        ),
        (
            "slow:worker=1,step=2,phase=reduce,factor=3.5",
            Injection(action="slow", worker=WorkerId(1), step=Step(2), phase="reduce", factor=3.5),
        ),
        (
            "slow:worker=1,step=2,phase=reduce",
            Injection(action="slow", worker=WorkerId(1), step=Step(2), phase="reduce", factor=DEFAULT_FACTOR),
        ),
    ],
)
def test_meaning(spec: str, wanted: Injection) -> None:
    assert parse_injection(spec) == wanted


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("", "kill:"),
        ("kill", "kill:"),
        ("melt:worker=1,step=2,phase=any", "kill:"),
        ("kill:", "worker="),
        ("kill:step=2,phase=any", "worker="),
        ("kill:worker=1,phase=any", "step="),
        ("kill:worker=1,step=2,phase=lunch", "lunch"),
        ("kill:worker=1,step=2,phase=any,colour=red", "colour"),
        ("kill:worker=1,worker=1,step=2,phase=any", "twice"),
        ("kill:worker=-1,step=2,phase=any", "worker=-1"),
        ("kill:worker=1_0,step=2,phase=any", "worker=1_0"),
        ("kill:worker=4294967296,step=2,phase=any", "4294967295"),
        (f"kill:worker=1,step={'9' * 5000},phase=any", "whole number"),
        ("kill:worker=1,step=2,phase=any,factor=2", "slow only"),
        ("slow:worker=1,step=2,phase=any,factor=1", "factor=1"),
        ("slow:worker=1,step=2,phase=any,factor=nan", "factor=nan"),
        ("slow:worker=1,step=2,phase=any,factor=inf", "factor=inf"),
        ("slow:worker=1,step=2,phase=any,factor=fast", "factor=fast"),
        ("kill:worker=1,step=2,phase=any,during=lunch", "during=lunch"),
    ],
)
def test_mistakes_are_named_in_one_line(spec: str, named: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse_injection(spec)
    assert named in str(refusal.value)
    assert "\n" not in str(refusal.value)
