"""The report of a run: one JSON file, a stable interface (docs/report.md)."""

import hashlib
import json
from array import array
from dataclasses import asdict
from pathlib import Path

from elaswave.core.config import ControllerConfig
from elaswave.core.events import Incident, JobEnded, StepRecorded
from elaswave_controller.files import write_atomically

REPORT_VERSION = 1


class Report:
    """What is known of a run so far. Steps may be recorded again after a restart of the job: the last one counts.

    25 bytes a step, so that runs of millions of steps do not grow the controller.
    """

    def __init__(self, *, job: str, config: ControllerConfig) -> None:
        self._job = job
        self._config = config
        self._first_step: int | None = None
        self._losses = array("d")
        self._seconds = array("d")
        self._samples = array("Q")
        self._known = bytearray()
        self._tokens = 0
        self._skipped: set[int] = set()
        self._incidents: list[Incident] = []

    def record_step(self, recorded: StepRecorded) -> None:
        """Add a decided step. Reports of different workers may overtake each other: steps may come in any order."""
        result = recorded.result
        if self._first_step is None:
            self._first_step = result.step
        missing = result.step - self._first_step
        if missing < 0:
            self._insert_before(-missing)
            self._first_step, missing = result.step, 0
        self._append_unknown(missing + 1 - len(self._losses))
        self._losses[missing] = result.loss
        self._seconds[missing] = recorded.seconds
        self._samples[missing] = result.samples
        if not self._known[missing]:
            self._known[missing] = 1
            self._tokens += result.tokens
        if result.skipped:
            self._skipped.add(result.step)

    def record_incident(self, incident: Incident) -> None:
        """Add a closed incident."""
        self._incidents.append(incident)

    @property
    def has_steps(self) -> bool:
        """Whether any step is recorded."""
        return self._first_step is not None

    @property
    def incidents(self) -> tuple[Incident, ...]:
        """All incidents so far, oldest first."""
        return tuple(self._incidents)

    def as_text(self, ended: JobEnded) -> str:
        """The report as JSON text. Losses are texts (`repr` of the float), so that no reader rounds them."""
        first = self._first_step or 0
        config = self._config
        content = {
            "version": REPORT_VERSION,
            "job": self._job,
            "exit_code": ended.exit_code,
            "message": ended.message,
            "first_step": first,
            "steps": first + len(self._losses),
            "digest": ended.digest,
            "losses": [repr(loss) if known else None for loss, known in zip(self._losses, self._known, strict=True)],
            "samples_digest": self._samples_digest(),
            "step_seconds": list(self._seconds),
            "skipped_steps": sorted(self._skipped),
            "tokens": self._tokens,
            "layout": {
                "dp": config.dp,
                "pp": config.pp,
                "tp": config.tp,
                "spares": config.spares,
                "nnodes": config.nnodes,
                "nproc_per_node": config.nproc_per_node,
                "replicas": config.replicas,
            },
            "incidents": [asdict(incident) for incident in self._incidents],
        }
        return json.dumps(content, indent=1, allow_nan=False) + "\n"

    def write(self, path: Path, ended: JobEnded) -> None:
        """Write the report in one piece. Raises OSError."""
        write_atomically(path, self.as_text(ended))

    def _append_unknown(self, count: int) -> None:
        if count > 0:
            self._losses.extend([0.0] * count)
            self._seconds.extend([0.0] * count)
            self._samples.extend([0] * count)
            self._known.extend(bytes(count))

    def _insert_before(self, count: int) -> None:
        self._losses = array("d", [0.0] * count) + self._losses
        self._seconds = array("d", [0.0] * count) + self._seconds
        self._samples = array("Q", [0] * count) + self._samples
        self._known = bytearray(count) + self._known

    def _samples_digest(self) -> str:
        digest = hashlib.sha256()
        for samples in self._samples:
            digest.update(samples.to_bytes(8, "little"))
        return digest.hexdigest()
