"""Status and incidents as text for people and as values for JSON (docs/report.md: a stable interface)."""

from dataclasses import asdict

from elaswave.core.events import Incident
from elaswave.core.status import JobStatus, WorkerStatus


def status_values(status: JobStatus) -> dict[str, object]:
    """What `elaswave status --json` prints."""
    return {
        "job": status.job,
        "state": status.state,
        "epoch": status.epoch,
        "step": status.step,
        "steps": status.steps,
        "workers": [_worker_values(worker) for worker in status.workers],
        "incidents": [incident_values(incident) for incident in status.incidents],
    }


def incident_values(incident: Incident) -> dict[str, object]:
    """One incident with the fields of the report."""
    return asdict(incident)


def status_text(status: JobStatus) -> str:
    """The job in one line, then a table of its workers."""
    steps = f" of {status.steps}" if status.steps else ""
    lines = [f"job {status.job}  {status.state}  step {status.step}{steps}  epoch {status.epoch}"]
    rows: list[tuple[str, ...]] = [("worker", "state", "pid", "node", "local", "inc", "step", "layers")]
    rows += [_worker_row(worker) for worker in status.workers]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return "\n".join(lines) + "\n"


def _worker_values(worker: WorkerStatus) -> dict[str, object]:
    return {
        "worker": worker.worker,
        "pid": worker.pid,
        "node": worker.node,
        "local_index": worker.local_index,
        "incarnation": worker.incarnation,
        "state": worker.state,
        "step": worker.step,
        "layers": list(worker.layers),
    }


def _worker_row(worker: WorkerStatus) -> tuple[str, ...]:
    return (
        str(worker.worker),
        worker.state,
        str(worker.pid) if worker.pid else "-",
        worker.node,
        str(worker.local_index),
        str(worker.incarnation),
        str(worker.step),
        _ranges(list(worker.layers)),
    )


def _ranges(layers: list[int]) -> str:
    """0-3,7: consecutive layers as ranges."""
    parts: list[list[int]] = []
    for layer in sorted(layers):
        if parts and parts[-1][-1] == layer - 1:
            parts[-1] = [parts[-1][0], layer]
        else:
            parts.append([layer])
    return ",".join("-".join(map(str, part)) for part in parts) or "-"
