"""What is shown of a job."""

import io
from dataclasses import replace
from pathlib import Path

import pytest

from elaswave.core.events import Incident, ShowLine, StepResult
from elaswave.core.ids import Epoch, Layer, NodeId, Step, WorkerId
from elaswave.core.status import JobStatus, WorkerStatus
from elaswave_launch.display import LiveDisplay, PlainDisplay, Progress, describe_incident
from elaswave_launch.tail import OutputTail
from elaswave_launch.texts import status_text, status_values

INCIDENT = Incident(
    epoch=Epoch(3), cause="killed", evidence="SIGKILL", workers=(WorkerId(5),), step=Step(11), phase="backward",
    detect_s=0.003, plan_s=0.0012, edit_s=0.002, repair_s=0.02, resume_s=0.01, delay_s=-1.0, redone_hops=3,
    dead_hops=4, step_hops=96, bytes_moved=1024, reason="worker 5 is gone",
)  # fmt: skip


def worker(number: int, state: str = "member", pid: int = 100) -> WorkerStatus:
    return WorkerStatus(
        worker=WorkerId(number), pid=pid, node=NodeId("node0"), local_index=number, incarnation=0, state=state,
        layers=(Layer(0), Layer(1), Layer(4)), step=Step(3),
    )  # fmt: skip


STATUS = JobStatus(
    job="j", epoch=Epoch(2), step=Step(3), steps=5, state="training",
    workers=(worker(0), worker(1, "gone", 0), worker(2, "suspected")), incidents=(INCIDENT,),
)  # fmt: skip


def result(step: int, loss: float = 2.5, *, skipped: bool = False) -> StepResult:
    return StepResult(step=Step(step), loss=loss, tokens=100, samples=0, grad_norm=1.0, skipped=skipped)


def test_the_line_has_step_loss_speed_workers_and_epoch() -> None:
    progress = Progress()
    assert progress.line() == "starting"
    progress.update(STATUS, 0.0)
    progress.update(result(2), 10.0)
    assert progress.line() == "step 3/5  loss 2.500000  1 worker  epoch 2"
    progress.update(result(3), 10.5)
    assert progress.line() == "step 4/5  loss 2.500000  200 tokens/s  1 worker  epoch 2"
    assert not progress.done
    progress.update(result(4, skipped=True), 11.0)
    assert progress.line() == "step 5/5  loss 2.500000  skipped  200 tokens/s  1 worker  epoch 2"
    assert progress.done
    before = progress.line()
    progress.update(replace(STATUS, workers=()), 12.0)
    assert progress.line() == before, "workers that leave after the last step are no news"


def test_an_incident_is_one_line_with_cause_and_phases() -> None:
    assert describe_incident(INCIDENT) == (
        "incident: killed, worker 5, step 12 in backward (SIGKILL); detect 3.0 ms  plan 1.2 ms  edit 2.0 ms  "
        "repair 20.0 ms  delay ?; 3 of 4 lost hops redone, 96 in the step, 1024 bytes moved; "
        "epoch 3: worker 5 is gone"
    )


def test_plain_lines_have_no_control_characters_and_are_few() -> None:
    stream = io.StringIO()
    display = PlainDisplay(stream)
    display.show(STATUS)
    for step in range(5):
        display.show(result(step))
    display.show(INCIDENT)
    display.show(ShowLine(text="a\x1b[31m line\r\x07"))
    display.close()
    lines = stream.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines[:2]] == ["step 1/5", "step 5/5"], "the first and the last"
    assert lines[2].startswith("incident: killed")
    assert lines[3] == "a?[31m line??"
    assert len(lines) == 4


def test_the_live_line_is_drawn_again_and_lines_stay_above_it() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    display = LiveDisplay(stream)
    display.show(STATUS)
    display.show(result(3))
    display.print_line("[bold]stays[/bold]")
    display.close()
    display.close()
    text = stream.getvalue()
    assert "[bold]stays[/bold]" in text, "text of others is no markup"
    assert "step 4/5" in text


def test_status_for_people_and_for_tools() -> None:
    lines = status_text(STATUS).splitlines()
    assert lines[0] == "job j  training  step 3 of 5  epoch 2"
    assert lines[1].split() == ["worker", "state", "pid", "node", "local", "inc", "step", "layers"]
    assert lines[2].split() == ["0", "member", "100", "node0", "0", "0", "3", "0-1,4"]
    assert lines[3].split() == ["1", "gone", "-", "node0", "1", "0", "3", "0-1,4"]
    values = status_values(STATUS)
    assert list(values) == ["job", "state", "epoch", "step", "steps", "workers", "incidents"]
    assert values["workers"][0] == {  # type: ignore[index]
        "worker": 0, "pid": 100, "node": "node0", "local_index": 0, "incarnation": 0, "state": "member", "step": 3,
        "layers": [0, 1, 4],
    }  # fmt: skip


@pytest.fixture
def tail(tmp_path: Path) -> tuple[OutputTail, list[tuple[int, str]], Path]:
    shown: list[tuple[int, str]] = []
    folder = tmp_path / "node0"
    folder.mkdir()
    return OutputTail(tmp_path, frozenset({0, 2}), lambda rank, line: shown.append((rank, line))), shown, folder


def test_output_is_shown_in_whole_lines_and_once(tail: tuple[OutputTail, list[tuple[int, str]], Path]) -> None:
    follower, shown, folder = tail
    follower.read_new()
    with (folder / "rank_0.out").open("wb", buffering=0) as file:
        file.write(b"one\ntw")
        (folder / "rank_1.out").write_text("not chosen\n")
        follower.read_new()
        assert shown == [(0, "one")]
        file.write(b"o\n\xff\nend")
        follower.read_new()
        (folder / "rank_2.out").write_text("late\n")
        follower.read_new(last=True)
    follower.read_new(last=True)
    assert shown == [(0, "one"), (0, "two"), (0, "\ufffd"), (0, "end"), (2, "late")]
