"""Reports of steps that an agent passes on: each step once and at once, repetitions when asked."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elaswave.core.ids import Step, WorkerId
from elaswave_agent.step_reports import StepReports

Told = tuple[int, int]


class Line:
    """What reaches the controller."""

    def __init__(self) -> None:
        self.told: list[Told] = []
        self.reports: StepReports[Told] = StepReports(self.told.append)

    def take(self, worker: int, step: int) -> None:
        self.reports.take(WorkerId(worker), Step(step), (worker, step))


@pytest.fixture
def line() -> Line:
    return Line()


def test_repetitions_wait_and_only_the_newest_of_each_worker_goes(line: Line) -> None:
    for step in (4, 5):
        for worker in (0, 1, 2):
            line.take(worker, step)
    assert line.told == [(0, 4), (0, 5)]
    line.reports.tell_repetitions()
    line.reports.tell_repetitions()
    assert line.told == [(0, 4), (0, 5), (1, 5), (2, 5)]


def test_a_step_that_the_fastest_left_out_goes_at_once(line: Line) -> None:
    line.take(0, 7)
    line.take(1, 6)
    assert line.told == [(0, 7), (1, 6)]


def test_after_a_restart_of_the_job_steps_are_told_again(line: Line) -> None:
    for worker in (0, 1):
        line.take(worker, 9)
    for worker in (0, 1):
        line.reports.forget(WorkerId(worker))
    line.reports.tell_repetitions()
    line.take(2, 9)
    assert line.told == [(0, 9), (2, 9)]


@given(st.data())
def test_every_step_is_told_when_first_reported_and_all_workers_end_up_at_their_last(data: st.DataObject) -> None:
    line, steps = Line(), [0, 0, 0]
    for _ in range(data.draw(st.integers(0, 40))):
        worker = data.draw(st.sampled_from([found for found in range(3) if steps[found] <= min(steps) + 1]))
        steps[worker] += data.draw(st.integers(1, 2))
        first = all(step != steps[worker] for _, step in line.told)
        line.take(worker, steps[worker])
        assert not first or line.told[-1] == (worker, steps[worker])
    line.reports.tell_repetitions()
    for worker, step in enumerate(steps):
        assert not step or max(told for who, told in line.told if who == worker) == step
