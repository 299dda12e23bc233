"""The report: a stable interface, described in docs/report.md."""

import hashlib
import json
from pathlib import Path

import pytest

from elaswave.core.config import ControllerConfig
from elaswave.core.events import CommitCheckpoint, Incident, JobEnded, StepRecorded, StepResult
from elaswave.core.ids import Epoch, Step, WorkerId
from elaswave.errors import ProtocolError
from elaswave_controller.checkpoint import commit_checkpoint
from elaswave_controller.report import Report

CONFIG = ControllerConfig(dp=4, pp=2, nnodes=4, nproc_per_node=2)
DONE = JobEnded(exit_code=0, message="", digest="abc")


def recorded(step: int, loss: float = 1.0, samples: int = 0, **more: float) -> StepRecorded:
    result = StepResult(step=Step(step), loss=loss, tokens=10, samples=samples, grad_norm=0.5, skipped=False)
    return StepRecorded(result=result, seconds=more.get("seconds", 0.25))


def as_json(report: Report, ended: JobEnded = DONE) -> dict[str, object]:
    content = json.loads(report.as_text(ended))
    assert isinstance(content, dict)
    return content


def test_losses_are_exact_and_in_step_order() -> None:
    losses = [0.1 + 0.2, 1 / 3, 5e-324, float("inf")]
    report = Report(job="j", config=CONFIG)
    for step, loss in enumerate(losses):
        report.record_step(recorded(step, loss))
    content = as_json(report)
    assert content["losses"] == ["0.30000000000000004", "0.3333333333333333", "5e-324", "inf"]
    assert content["steps"] == 4
    assert content["first_step"] == 0
    assert content["step_seconds"] == [0.25] * 4
    assert content["digest"] == "abc"
    assert content["tokens"] == 40


def test_samples_digest_is_over_eight_little_endian_bytes_a_step() -> None:
    values = [1, 2**64 - 1, 0x0102030405060708]
    report = Report(job="j", config=CONFIG)
    for step, samples in enumerate(values):
        report.record_step(recorded(step, samples=samples))
    expected = hashlib.sha256(b"".join(value.to_bytes(8, "little") for value in values)).hexdigest()
    assert as_json(report)["samples_digest"] == expected


def test_steps_in_any_order_give_the_same_report() -> None:
    texts = set()
    for order in ([3, 4, 5, 6], [4, 3, 6, 5], [6, 5, 4, 3]):
        report = Report(job="j", config=CONFIG)
        for step in order:
            report.record_step(recorded(step, loss=float(step), samples=step, seconds=step / 8))
        texts.add(report.as_text(DONE))
    assert len(texts) == 1
    content = json.loads(texts.pop())
    assert (content["first_step"], content["steps"]) == (3, 7)
    assert content["losses"] == ["3.0", "4.0", "5.0", "6.0"]


def test_a_step_done_again_after_a_restart_counts_once() -> None:
    report = Report(job="j", config=CONFIG)
    for step in (0, 1, 2, 1, 2, 3):
        report.record_step(recorded(step, loss=float(step)))
    content = as_json(report)
    assert content["losses"] == ["0.0", "1.0", "2.0", "3.0"]
    assert content["tokens"] == 40


def test_a_step_that_nobody_reported_is_null() -> None:
    report = Report(job="j", config=CONFIG)
    report.record_step(recorded(0))
    report.record_step(recorded(2))
    assert as_json(report)["losses"] == ["1.0", None, "1.0"]


def test_incidents_have_the_fields_that_tools_rely_on() -> None:
    incident = Incident(
        epoch=Epoch(3), cause="killed", evidence="SIGKILL", workers=(WorkerId(5),), step=Step(12), phase="backward",
        detect_s=0.003, plan_s=0.001, edit_s=0.002, repair_s=0.02, delay_s=0.03, redone_hops=3, dead_hops=4,
        step_hops=96, bytes_moved=1024, reason="worker 5 is gone", resume_s=0.01,
    )  # fmt: skip
    report = Report(job="j", config=CONFIG)
    report.record_incident(incident)
    incidents = as_json(report)["incidents"]
    assert isinstance(incidents, list)
    wanted = {
        "epoch", "cause", "evidence", "workers", "step", "phase", "detect_s", "plan_s", "edit_s", "repair_s",
        "delay_s", "redone_hops", "dead_hops", "step_hops", "bytes_moved", "reason",
    }  # fmt: skip
    assert wanted <= incidents[0].keys()
    assert incidents[0]["workers"] == [5]


def test_the_layout_and_the_ending_are_told() -> None:
    content = as_json(Report(job="j", config=CONFIG), JobEnded(exit_code=1, message="worker 3 raised"))
    assert content["layout"] == {
        "dp": 4, "pp": 2, "tp": 1, "spares": 0, "nnodes": 4, "nproc_per_node": 2, "replicas": 1,
    }  # fmt: skip
    assert (content["exit_code"], content["message"], content["steps"]) == (1, "worker 3 raised", 0)


def test_the_file_is_replaced_in_one_piece(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")
    report = Report(job="j", config=CONFIG)
    report.write(path, DONE)
    assert json.loads(path.read_text())["job"] == "j"
    assert list(tmp_path.iterdir()) == [path], "no temporary file stays"
    with pytest.raises(FileNotFoundError):
        report.write(tmp_path / "missing" / "report.json", DONE)


# ------------------------------------------------------------------ the index of a checkpoint


def test_commit_writes_the_index_before_latest(tmp_path: Path) -> None:
    effect = CommitCheckpoint(step=Step(40), manifests=('{"worker": 0}', '{"worker": 1}'))
    folder = commit_checkpoint(tmp_path, effect)
    assert folder == tmp_path / "step_40"
    assert json.loads((folder / "checkpoint.json").read_text()) == {
        "version": 1, "step": 40, "parts": [{"worker": 0}, {"worker": 1}],
    }  # fmt: skip
    assert (tmp_path / "latest").read_text() == "step_40\n"


@pytest.mark.parametrize("manifest", ["", "[1]", "{"])
def test_a_bad_manifest_makes_no_checkpoint(tmp_path: Path, manifest: str) -> None:
    commit_checkpoint(tmp_path, CommitCheckpoint(step=Step(20), manifests=("{}",)))
    with pytest.raises(ProtocolError, match="step 40"):
        commit_checkpoint(tmp_path, CommitCheckpoint(step=Step(40), manifests=("{}", manifest)))
    assert (tmp_path / "latest").read_text() == "step_20\n"
    assert not (tmp_path / "step_40" / "checkpoint.json").exists()
