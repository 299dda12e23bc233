"""Book-keeping of incidents: phases add up, hops are counted once."""

from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elaswave.core.events import Progress, RepairHop, WorkDone
from elaswave.core.ids import Epoch, Layer, MicroBatch, NodeId, Step, WorkerId
from elaswave.core.incidents import OpenIncident, hops_of_step, usual_step
from elaswave.core.plan import Hop, Member, Plan, RouteTable


def opened(lost: tuple[Progress, ...] = (), last_alive_at: float = 10.0) -> OpenIncident:
    return OpenIncident(
        epoch=Epoch(2),
        cause="killed",
        evidence="pidfd",
        workers=(WorkerId(1),),
        step=Step(5),
        phase="forward",
        last_alive_at=last_alive_at,
        noticed_at=10.5,
        planned_at=10.75,
        reason="why",
        step_hops=16,
        lost_progress=lost,
    )


def plan_of(*workers: int, routes: int = 3) -> Plan:
    members = tuple(Member(worker=WorkerId(w), node=NodeId("a"), local_index=w, incarnation=0) for w in workers)
    route = tuple(
        Hop(worker=WorkerId(workers[0]), epoch=Epoch(1), first=Layer(cut), last=Layer(cut + 1)) for cut in (0, 1)
    )
    return Plan(
        epoch=Epoch(2),
        reason="",
        members=members,
        hosting={},
        tables=(RouteTable(first_step=Step(0), routes=(route,) * routes),),
        groups=(),
    )


def done(step: int, hops: list[tuple[int, bool]], start: float = 11.0) -> WorkDone:
    repaired = tuple(
        RepairHop(micro_batch=MicroBatch(m), first_layer=Layer(0), backward=backward) for m, backward in hops
    )
    return WorkDone(
        worker=WorkerId(0), epoch=Epoch(2), step=Step(step), hops=repaired, bytes=10, first_start=start, last_end=start
    )


def test_phases_follow_one_another() -> None:
    incident = opened()
    plan = plan_of(0, 2)
    incident.adopted_by(WorkerId(0), 11.0, plan)
    assert incident.edited_at is None
    incident.adopted_by(WorkerId(2), 11.25, plan)
    incident.adopted_by(WorkerId(0), 99.0, plan)
    incident.work_done(done(5, [(0, False)], start=11.125), 12.25)
    incident.work_done(done(5, [(1, False)], start=11.5), 12.0)
    found = incident.close(seconds=3.0, usual=1.0)
    assert (found.detect_s, found.plan_s, found.edit_s, found.repair_s) == (0.5, 0.25, 0.5, 1.0)
    assert (found.resume_s, found.delay_s, found.bytes_moved) == (1.125, 2.0, 20)


def test_what_is_not_known_is_told_as_such() -> None:
    found = opened(last_alive_at=0.0).close(seconds=1.0, usual=1.0)
    assert (found.detect_s, found.edit_s, found.repair_s, found.resume_s) == (-1.0, -1.0, 0.0, -1.0)


@given(
    st.lists(st.tuples(st.integers(0, 7), st.booleans())),
    st.integers(0, 255),
    st.integers(0, 255),
    st.integers(4, 6),
)
def test_redone_hops_are_those_that_the_dead_had_begun(
    hops: list[tuple[int, bool]], forward: int, backward: int, step: int
) -> None:
    lost = Progress(step=Step(5), phase="forward", forward_begun=forward, backward_begun=backward)
    incident = opened((lost,))
    incident.work_done(done(step, hops), 11.0)
    incident.work_done(done(step, hops), 12.0)
    begun = {(m, False) for m in range(8) if forward & 1 << m} | {(m, True) for m in range(8) if backward & 1 << m}
    found = incident.close(1.0, 1.0)
    assert found.redone_hops == (len(begun & set(hops)) if step == 5 else 0)
    assert found.dead_hops == len(begun)
    assert found.redone_hops <= found.dead_hops


@given(st.lists(st.floats(0, 100), max_size=120))
def test_the_usual_step_is_the_median_of_the_recent_ones(seconds: list[float]) -> None:
    assert usual_step(seconds) == (median(seconds[-50:]) if seconds else 0.0)


@pytest.mark.parametrize("routes", [1, 4])
def test_hops_of_a_step_run_forward_and_backward(routes: int) -> None:
    assert hops_of_step(plan_of(0, routes=routes), Step(3)) == 4 * routes
