"""Stories: lines that cannot happen are refused, bad ends are seen."""

from dataclasses import replace

import pytest

from elaswave.core.facts import ShardScalars
from elaswave.core.ids import ShardId, WorkerId
from elaswave.core.protocol.worker import StepProtocol
from elaswave.sim.scenes import DP2, PP2
from elaswave.sim.shell import Violation
from elaswave.sim.stories import Story, Unplayable, play


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ("0>1 Decided", "no such fact is under way"),
        ("run but 0>1:Partiel", "nothing is called '0>1:Partiel'"),
        ("run but adpot1", "nothing is called 'adpot1'"),
        ("run 0>1", "nothing is called '0>1'"),
        ("run until w0", "give a worker and a step"),
        ("run until w0 at one", "give a worker and a step"),
        ("adopt 0", "it has adopted every plan"),
    ],
)
def test_a_line_that_cannot_happen_is_refused(lines: str, why: str) -> None:
    with pytest.raises(Unplayable, match=why):
        play(Story(tells="A slip.", scene=PP2, lines=lines))


def test_what_is_withheld_does_not_happen_before_the_line_ends() -> None:
    with pytest.raises(Unplayable, match="0>1 Gradient"):
        play(Story(tells="w1 needs w0 to begin.", scene=PP2, lines="run but hop0\n0>1 Gradient"))
    with pytest.raises(Unplayable, match="0>1 Decided"):
        play(Story(tells="All of step 0 is under way.", scene=PP2, lines="run but 0>1:Activation\n0>1 Decided"))


def test_what_comes_last_and_where_a_run_stops() -> None:
    story = Story(tells="w0 waits for its own work.", scene=DP2, lines="run last hop0 until w0 at 0\n0>1 Partial")
    with pytest.raises(Unplayable):
        play(story)
    assert play(Story(tells="To the end.", scene=DP2, lines="run until w0 at 1 # ends there")).plan.finished


def test_a_story_must_not_need_a_checkpoint() -> None:
    alone = replace(DP2, copies=(((0,), 0, ()),), replicas=0)
    with pytest.raises(Violation, match="ends by: fall back"):
        play(Story(tells="The only copy dies.", scene=alone, lines="crash 0"))


def test_a_run_that_stands_still_is_seen() -> None:
    class Mute(StepProtocol):
        def _send_have(self, entries: tuple[tuple[ShardId, ShardScalars], ...], to: tuple[WorkerId, ...]) -> None:
            pass

    with pytest.raises(Violation, match="waits for ever: w0 at step 0"):
        play(Story(tells="Nobody says what it holds.", scene=PP2, lines=""), Mute)
