"""Jobs: what is refused, and in which words."""

from collections.abc import Callable

import pytest
from numerics_harness import Mixer, Tokens, in_fresh_process, small_job

import elaswave as ew
from elaswave.core.ids import Step
from elaswave.errors import ConfigError
from elaswave.job import SGD, AdamW, Constant, WarmupCosine, WarmupLinear

BAD_JOBS = [
    ({"layers": []}, "Job.layers is empty"),
    ({"global_batch": 0}, "Job.global_batch is 0: must be at least 1"),
    ({"micro_batch": -1}, "Job.micro_batch is -1: must be at least 1"),
    ({"global_batch": 7}, "Job.global_batch 7 is not divisible by micro_batch 2: give a multiple, such as 8"),
    ({"global_batch": 128}, "Job.data has 64 samples, fewer than global_batch 128"),
    (
        {"global_batch": 2**21, "micro_batch": 1, "data": Tokens(2**21)},
        "makes 2097152 micro-batches: at most 1048576 are possible",
    ),
    ({"steps": -3}, "Job.steps is -3: must be at least 1"),
    ({"seed": -1}, f"Job.seed is -1: must be from 0 to {2**63 - 1}"),
    ({"seed": 2**63}, "Job.seed is 9223372036854775808"),
    ({"clip_norm": 0.0}, "Job.clip_norm is 0.0: must be a finite number above 0"),
    ({"clip_norm": float("nan")}, "Job.clip_norm is nan"),
    ({"parameter_dtype": "float16"}, "Job.parameter_dtype is 'float16': must be one of float32, bfloat16"),
    ({"accumulation": "exact32"}, "Job.accumulation is 'exact32': must be one of exact64, float32"),
    ({"non_finite": "ignore"}, "Job.non_finite is 'ignore': must be one of raise, skip-step"),
    ({"quantum_exponent": -200}, "Job.quantum_exponent is -200: must be from -80 to 0"),
    ({"quantum_exponent": 1}, "Job.quantum_exponent is 1: must be from -80 to 0"),
    ({"optimizer": "adam"}, "Job.optimizer is a str: give elaswave.AdamW or elaswave.SGD"),
    ({"schedule": 0.1}, "Job.schedule is a float: give elaswave.Constant"),
    ({"evaluate_every": 5}, "Job.evaluate is not given and evaluate_every is 5: give both or neither"),
    ({"evaluate": lambda found: None}, "Job.evaluate is given and evaluate_every is 0: give both or neither"),
    ({"evaluate_every": -1}, "Job.evaluate_every is -1"),
    ({"tied": [[(0, "a"), (4, "b")]]}, "Job.tied names layer 4: layers are 0 to 3"),
    ({"tied": [[(0, "a"), (1, "a")], [(0, "a"), (2, "a")]]}, "Job.tied names parameter 'a' of layer 0 twice"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_JOBS, ids=[message[:40] for _, message in BAD_JOBS])
def test_a_bad_job_is_refused_in_one_line(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        small_job(**changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


BAD_PARTS = [
    (lambda: AdamW(lr=0.0), "AdamW.lr is 0.0: must be a finite number above 0"),
    (lambda: AdamW(lr=float("inf")), "AdamW.lr is inf"),
    (lambda: AdamW(lr=1.0, betas=(0.9, 1.0)), "AdamW.betas has 1.0: must be from 0 to below 1"),
    (lambda: AdamW(lr=1.0, eps=1e-50), "AdamW.eps is 1e-50: must be a finite number from 1e-30 on"),
    (lambda: AdamW(lr=1.0, weight_decay=-1.0), "AdamW.weight_decay is -1.0"),
    (lambda: SGD(lr=-1.0), "SGD.lr is -1.0"),
    (lambda: SGD(lr=1.0, momentum=1.5), "SGD.momentum has 1.5"),
    (lambda: SGD(lr=1.0, weight_decay=float("nan")), "SGD.weight_decay is nan"),
    (lambda: WarmupCosine(total_steps=5, warmup_steps=5), "WarmupCosine.warmup_steps is 5 and total_steps 5"),
    (lambda: WarmupLinear(total_steps=0), "WarmupLinear.warmup_steps is 0 and total_steps 0"),
    (lambda: WarmupLinear(total_steps=3, final_factor=-0.1), "WarmupLinear.final_factor is -0.1"),
]


@pytest.mark.parametrize(("make", "message"), BAD_PARTS, ids=[message[:40] for _, message in BAD_PARTS])
def test_bad_optimizers_and_schedules_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert message in str(caught.value)


def test_defaults_follow_from_what_is_given() -> None:
    job = ew.Job(layers=[Mixer], loss=lambda out, target: out, data=Tokens(70), optimizer=SGD(lr=1.0), global_batch=16)
    assert (job.steps, job.micro_batches) == (4, 16)
    assert isinstance(job.layers, tuple)


def test_schedules_are_functions_of_the_step() -> None:
    assert [Constant().factor(Step(step)) for step in (0, 10**6)] == [1.0, 1.0]
    cosine = WarmupCosine(total_steps=12, warmup_steps=4, final_factor=0.2)
    found = [cosine.factor(Step(step)) for step in (0, 3, 4, 8, 12, 99)]
    assert found == pytest.approx([0.25, 1.0, 1.0, 0.6, 0.2, 0.2])
    linear = WarmupLinear(total_steps=12, warmup_steps=4)
    assert [linear.factor(Step(step)) for step in (1, 4, 10, 12, 13)] == pytest.approx([0.5, 1.0, 0.25, 0.0, 0.0])
    assert small_job(schedule=cosine).learning_rate(Step(0)) == pytest.approx(0.0025)


def test_importing_elaswave_is_cheap_and_its_names_come_when_used() -> None:
    code = (
        "import sys, elaswave as ew; ew.Job, ew.AdamW, ew.ConfigError, ew.StepResult; "
        "print('torch' in sys.modules, 'grpc' in sys.modules); ew.train; print('torch' in sys.modules)"
    )
    assert in_fresh_process(code).split() == ["False", "False", "True"]
    assert set(ew.__all__) <= set(dir(ew))
    assert all(getattr(ew, name).__name__ == name for name in ew.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Jobs'"):
        ew.Jobs  # noqa: B018
