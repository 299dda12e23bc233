"""Life of a worker process: the literal table."""

import pytest

from elaswave.core.ids import NodeId, WorkerId
from elaswave.core.membership import TRANSITIONS, Trigger, WorkerRecord, WorkerState
from elaswave.errors import InvariantError

S, T = WorkerState, Trigger


def record(state: WorkerState, incarnation: int = 0) -> WorkerRecord:
    return WorkerRecord(worker=WorkerId(3), node=NodeId("a"), local_index=1, incarnation=incarnation, state=state)


@pytest.mark.parametrize("trigger", Trigger)
@pytest.mark.parametrize("state", WorkerState)
def test_every_pair_moves_as_the_table_says_or_changes_nothing(state: WorkerState, trigger: Trigger) -> None:
    worker = record(state)
    target = TRANSITIONS.get((state, trigger))
    if target is None:
        with pytest.raises(InvariantError, match=f"worker 3 is {state.value}: {trigger.value} cannot happen"):
            worker.move(trigger)
        assert worker.state is state
    else:
        worker.move(trigger)
        assert worker.state is target


def test_the_dead_stay_dead_and_whoever_is_told_to_die_does() -> None:
    assert {target for (state, _), target in TRANSITIONS.items() if state is S.GONE} == {S.GONE}
    assert {target for (state, _), target in TRANSITIONS.items() if state is S.FENCED} == {S.FENCED, S.GONE}
    assert all(TRANSITIONS[state, T.EXITED] is S.GONE for state in WorkerState)


def test_only_the_warm_are_admitted_and_suspicion_can_be_taken_back() -> None:
    assert [state for (state, trigger) in TRANSITIONS if trigger is T.ADMITTED] == [S.WARM]
    assert TRANSITIONS[S.MEMBER, T.SUSPECTED] is S.SUSPECTED
    assert TRANSITIONS[S.SUSPECTED, T.CLEARED] is S.WARM
    # Who was never a member has no work to lose: suspicion of it changes nothing but its readiness.
    assert TRANSITIONS[S.STARTING, T.SUSPECTED] is S.STARTING


def test_every_state_can_be_reached_and_left() -> None:
    reached = {S.STARTING, *TRANSITIONS.values()}
    assert reached == set(WorkerState)
    assert {state for (state, _), target in TRANSITIONS.items() if target is not state} == set(WorkerState) - {S.GONE}


def test_names_for_people() -> None:
    assert record(S.WARM).name == "worker 3 (a/1)"
    assert record(S.WARM, incarnation=1).name == "worker 3 (a/1, start 2)"
    assert record(S.WARM).member().worker == 3
