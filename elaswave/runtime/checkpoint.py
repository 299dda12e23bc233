"""Durable checkpoints: owners write their shards, the controller writes the index that makes them valid.

Layout: `<save_dir>/step_<k>/worker_<id>.bin` holds optimizer states (rows of float32: master value, then moments) of
consecutive shards; `checkpoint.json` beside it lists every part. Parts are found by layer and parameter name, so any
layout can resume.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from elaswave.core.ids import BlockId, ShardId, Step, WorkerId
from elaswave.core.parameters import BlockLayout
from elaswave.core.shape import ModelShape, Shard
from elaswave.errors import ConfigError
from elaswave.job import Job
from elaswave.runtime.shards import ShardState, state_rows

INDEX = "checkpoint.json"
USER_STATE = "user_state.bin"


def write_shards(
    save_dir: Path,
    step: Step,
    worker: WorkerId,
    states: Mapping[ShardId, ShardState],
    *,
    shape: ModelShape,
    layout: BlockLayout,
    job_digest: str,
) -> str:
    """Write these states at version `step`, durably; the part of the index, as text. Raises OSError."""
    folder = save_dir / f"step_{step}"
    folder.mkdir(parents=True, exist_ok=True)
    name = f"worker_{worker}.bin"
    parts: list[dict[str, object]] = []
    offset = 0
    with open(folder / name, "wb") as file:
        for index, state in sorted(states.items()):
            data = state.serialised().numpy().data
            shard = shape.shards[index]
            part = {"block": shard.block, "start": shard.start, "stop": shard.stop, "offset": offset}
            parts.append({**part, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
            file.write(data)
            offset += len(data)
        file.flush()
        os.fsync(file.fileno())
    places = [[layer, name_, p.block, p.offset, list(p.shape)] for (layer, name_), p in layout.placements.items()]
    return json.dumps({"file": name, "job": job_digest, "parts": parts, "parameters": places})


def write_user_state(save_dir: Path, step: Step, data: Tensor | None) -> None:
    """Write the user's declared state, sealed by its digest, beside the shards; durably. Raises OSError."""
    if data is None:
        return
    folder = save_dir / f"step_{step}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / USER_STATE, "wb") as file:
        file.write(data.numpy().data)
        file.flush()
        os.fsync(file.fileno())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    file: Path
    block: BlockId
    start: int
    stop: int
    offset: int
    length: int
    sha256: str


class CheckpointReader:
    """Reads states of any slices of blocks from a complete checkpoint. `open` checks that it fits the job."""

    def __init__(self, folder: Path, step: Step, parts: tuple[_Part, ...], rows: int, job_digest: str) -> None:
        self.folder = folder
        self.job_digest = job_digest
        self.step = step
        self._parts = parts
        self._rows = rows

    @classmethod
    def open(cls, folder: Path, job: Job, layout: BlockLayout) -> "CheckpointReader":
        """Raises ConfigError where the checkpoint cannot be read or belongs to another model."""
        path = folder / INDEX
        try:
            index = json.loads(path.read_text())
            found = [
                cls._part(folder, manifest["file"], part) for manifest in index["parts"] for part in manifest["parts"]
            ]
            places = {(row[0], row[1]): (row[2], row[3], tuple(row[4])) for row in index["parts"][0]["parameters"]}
            step = Step(int(index["step"]))
            job_digest = str(index["parts"][0]["job"])
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise ConfigError(
                f"checkpoint {path} cannot be read ({error!r}): give another one with --resume"
            ) from error
        wanted = {key: (p.block, p.offset, p.shape) for key, p in layout.placements.items()}
        for key in sorted(wanted.keys() | places.keys()):
            if wanted.get(key) != places.get(key):
                raise ConfigError(
                    f"checkpoint {folder}: parameter {key[1]!r} of layer {key[0]} is {places.get(key)} there and "
                    f"{wanted.get(key)} in this model (block, offset, shape): resume with the model that wrote it"
                )
        return cls(folder, step, tuple(found), state_rows(job.optimizer), job_digest)

    @staticmethod
    def _part(folder: Path, file: str, part: Mapping[str, object]) -> _Part:
        numbers = {key: int(cast(int, part[key])) for key in ("block", "start", "stop", "offset", "bytes")}
        return _Part(
            file=folder / Path(file).name,
            block=BlockId(numbers["block"]),
            start=numbers["start"],
            stop=numbers["stop"],
            offset=numbers["offset"],
            length=numbers["bytes"],
            sha256=str(part["sha256"]),
        )

    def user_state(self) -> Tensor | None:
        """The sealed state of the user's, or None where the job that wrote this had none."""
        try:
            data = bytearray((self.folder / USER_STATE).read_bytes())
        except FileNotFoundError:
            return None
        return torch.frombuffer(data, dtype=torch.uint8)

    def read(self, shard: Shard) -> ShardState:
        """State of any slice of a block. Raises ConfigError for damaged or missing parts."""
        rows = torch.empty(self._rows, shard.elements)
        filled = 0
        for part in self._parts:
            start, stop = max(part.start, shard.start), min(part.stop, shard.stop)
            if part.block != shard.block or start >= stop:
                continue
            source = self._load(part)
            rows[:, start - shard.start : stop - shard.start] = source[:, start - part.start : stop - part.start]
            filled += stop - start
        if filled != shard.elements:
            raise ConfigError(f"checkpoint {self.folder}: {filled} of {shard.elements} elements of {shard} are there")
        return ShardState(rows)

    def _load(self, part: _Part) -> Tensor:
        expected = self._rows * (part.stop - part.start) * 4
        try:
            with open(part.file, "rb") as file:
                file.seek(part.offset)
                data = bytearray(file.read(part.length))
        except OSError as error:
            raise ConfigError(f"checkpoint file {part.file} cannot be read ({error}): give another one") from error
        if len(data) != part.length or part.length != expected or hashlib.sha256(data).hexdigest() != part.sha256:
            raise ConfigError(f"checkpoint file {part.file} is damaged at byte {part.offset}: give another checkpoint")
        return torch.frombuffer(data, dtype=torch.float32).view(self._rows, -1)
