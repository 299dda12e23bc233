"""The user's callbacks and declared state: called on one worker, kept by two, handed on when the caller dies.

The plan's caller calls. After each step it sends the user's state to the keeper; who becomes the caller takes the
newest state that it was sent and repeats the callbacks of the steps since, whose results all workers know. So a
callback runs at least once per step, and its state is that of the last step whatever dies, one worker at a time.
"""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor

from elaswave.core.events import StepResult
from elaswave.core.ids import WorkerId
from elaswave.core.plan import Plan
from elaswave.errors import ProtocolError
from elaswave.job import Job, StateValue
from elaswave.runtime.codec import bytes_of_tensor
from elaswave.runtime.user_code import UserCode

REMEMBERED_STEPS = 256
"""Results kept by workers that neither call nor keep; the keeper is behind by one step, as a rule."""

SendSnapshot = Callable[[WorkerId, int, Tensor], None]


class Callbacks:
    """on_step and the declared state of one job on one worker."""

    def __init__(self, job: Job, me: WorkerId, send_snapshot: SendSnapshot, show: Callable[[str], None]) -> None:
        self._job = job
        self._me = me
        self._send_snapshot = send_snapshot
        self._show = show
        self._results: deque[StepResult] = deque(maxlen=REMEMBERED_STEPS)
        self._done_version = -1
        self._snapshot: tuple[int, Tensor] | None = None
        self._keeper: WorkerId | None = None

    @property
    def needed(self) -> bool:
        """Whether the job has anything to call or keep."""
        return self._job.on_step is not None or self._job.state is not None

    def resume(self, version: int, sealed: Tensor | None) -> None:
        """Start with the state of a checkpoint, if it has one. Raises ProtocolError where it is damaged."""
        if sealed is not None and self._job.state is not None:
            self._snapshot = (version, check_snapshot(sealed))

    def sealed_state(self) -> Tensor | None:
        """The declared state as the caller has it now; None where the job declares none."""
        return None if self._job.state is None else seal_snapshot(self._packed())

    def step_decided(self, result: StepResult, plan: Plan) -> None:
        """The result of a step is known here."""
        if not self.needed:
            return
        self._results.append(result)
        self.catch_up(plan)

    def plan_changed(self, plan: Plan) -> None:
        """Whoever calls or keeps may be another worker now."""
        if self.needed and plan.ids and self._me in plan.ids:
            self._keeper = None if plan.keeper != self._keeper else self._keeper
            self.catch_up(plan)

    def snapshot_received(self, version: int, data: Tensor) -> None:
        """State after step version - 1, digest-verified by its sender's frame. Raises ProtocolError."""
        if self._snapshot is None or version > self._snapshot[0]:
            self._snapshot = (version, check_snapshot(data))
        while self._results and self._results[0].step < version:
            self._results.popleft()

    def catch_up(self, plan: Plan) -> None:
        """As the caller, run what has not been run; then hand the state to the keeper."""
        if self._me != plan.caller:
            return
        self._take_over()
        changed = False
        for result in self._results:
            if result.step + 1 > self._done_version:
                self._call(result)
                self._done_version = result.step + 1
                changed = True
        self._results.clear()
        keeper = plan.keeper
        if keeper is not None and self._done_version >= 0 and (changed or keeper != self._keeper):
            self._keeper = keeper
            self._send_snapshot(keeper, self._done_version, seal_snapshot(self._packed()))

    def _take_over(self) -> None:
        """As a new caller, go on where the last one is known to have been; without a snapshot, at the newest step."""
        if self._snapshot is not None and self._snapshot[0] > self._done_version:
            self._done_version = self._snapshot[0]
            if self._job.state is not None:
                with UserCode("state.load_state_dict"):
                    self._job.state.load_state_dict(unpack_state(self._snapshot[1]))
        elif self._done_version < 0 and self._results:
            self._done_version = self._results[-1].step

    def _packed(self) -> bytes:
        if self._job.state is None:
            return pack_state({})
        with UserCode("state.state_dict"):
            return pack_state(self._job.state.state_dict())

    def _call(self, result: StepResult) -> None:
        if self._job.on_step is None:
            return
        with UserCode("on_step"):
            text = self._job.on_step(result)
        if text:
            self._show(text)


# ---------------------------------------------------------------------- bytes of a state


def pack_state(state: Mapping[str, StateValue]) -> bytes:
    """Plain values as JSON, tensors as references into the bytes behind it. Raises ProtocolError for other values."""
    tensors: list[Tensor] = []

    def plain(value: object) -> object:
        if isinstance(value, Tensor):
            tensors.append(value.detach().to("cpu").contiguous())
            return {"__tensor__": len(tensors) - 1, "dtype": str(value.dtype), "shape": list(value.shape)}
        if isinstance(value, Mapping):
            return {str(key): plain(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [plain(inner) for inner in value]
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise ProtocolError(f"declared state holds a {type(value).__name__}: only plain values and tensors survive")

    text = json.dumps(plain(state)).encode()
    parts = [len(text).to_bytes(8, "little"), text]
    parts += [bytes(bytes_of_tensor(tensor)) for tensor in tensors if tensor.numel()]
    return b"".join(parts)


def unpack_state(data: Tensor) -> Mapping[str, StateValue]:
    """The state again. Raises ProtocolError where the bytes are not one."""
    raw = bytes(data.numpy().data)
    length = int.from_bytes(raw[:8], "little")
    if length > len(raw) - 8:
        raise ProtocolError(f"a state of {len(raw)} bytes names a heading of {length}")
    offset = 8 + length

    def rich(value: object) -> StateValue:
        nonlocal offset
        if isinstance(value, dict) and "__tensor__" in value:
            dtype = getattr(torch, str(value["dtype"]).removeprefix("torch."))
            shape = [int(extent) for extent in value["shape"]]
            count = 1
            for extent in shape:
                count *= extent
            part = bytearray(raw[offset : offset + count * dtype.itemsize])
            offset += len(part)
            found: Tensor = (
                torch.frombuffer(part, dtype=dtype).view(shape) if count else torch.empty(shape, dtype=dtype)
            )
            return found
        if isinstance(value, dict):
            return {key: rich(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [rich(inner) for inner in value]
        return cast(StateValue, value)

    return cast("Mapping[str, StateValue]", rich(json.loads(raw[8 : 8 + length])))


def seal_snapshot(data: bytes) -> Tensor:
    """The bytes behind their sha256."""
    return torch.frombuffer(bytearray(hashlib.sha256(data).digest() + data), dtype=torch.uint8)


def check_snapshot(data: Tensor) -> Tensor:
    """The bytes without their digest. Raises ProtocolError where it does not fit."""
    raw = data.numpy()
    if hashlib.sha256(raw[32:].data).digest() != raw[:32].tobytes():
        raise ProtocolError(f"a snapshot of {len(raw)} bytes does not have the digest that it names")
    return data[32:]
