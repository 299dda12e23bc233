"""Facts as frames between workers: kind, meta bytes, payload. Own binary format; every length is checked on decode.

Meta holds the fact's key and scalars, little-endian, in the order of its fields; exact sums as length-prefixed two's
complement. A tensor payload is preceded in meta by its type and shape.
"""

import struct
from enum import IntEnum
from functools import lru_cache

import torch
from torch import Tensor

from elaswave.core import facts
from elaswave.core.facts import Decision, Fact, LossScalars, NonFinite, ShardScalars
from elaswave.core.ids import Coverage, Epoch, Layer, MicroBatch, ShardId, Step
from elaswave.errors import InvariantError, ProtocolError

MAX_EXACT_BYTES = 512
MAX_COVERAGE_BYTES = 1 << 18
MAX_ENTRIES = 1 << 20
MAX_DIMENSIONS = 16


class FrameKind(IntEnum):
    """Kinds of frames on a link. The first ten are facts of the protocol, the rest belongs to the runtime."""

    ACTIVATION = 1
    GRADIENT = 2
    PARTIAL = 3
    REDUCED = 4
    HAVE = 5
    DECIDED = 6
    PARAMETERS = 7
    PARAMETERS_REQUEST = 8
    STATE_REQUEST = 9
    STATE = 10
    GRANT = 20
    BLOCK_REQUEST = 21
    BLOCK = 22
    SNAPSHOT = 23
    BLOCK_GONE = 24


_DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float64,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)
_NUMPY_FLOATS = (torch.float16, torch.float32, torch.float64)
_DTYPE_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}


@lru_cache(maxsize=MAX_DIMENSIONS + 1)
def _numbers(count: int) -> struct.Struct:
    return struct.Struct(f"<{count}Q")


class Writer:
    """Builds meta bytes."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def numbers(self, *values: int) -> "Writer":
        """Unsigned 64-bit numbers."""
        self._parts.append(_numbers(len(values)).pack(*values))
        return self

    def exact(self, value: int) -> "Writer":
        """A signed integer of any length."""
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        self._parts.append(struct.pack("<H", len(data)))
        self._parts.append(data)
        return self

    def mask(self, value: int) -> "Writer":
        """An unsigned bit mask."""
        data = value.to_bytes((value.bit_length() + 7) // 8, "little")
        self._parts.append(struct.pack("<I", len(data)))
        self._parts.append(data)
        return self

    def blob(self, value: bytes) -> "Writer":
        """Bytes up to the end of the meta."""
        self._parts.append(value)
        return self

    def finish(self) -> bytes:
        """All of it."""
        return b"".join(self._parts)


class Reader:
    """Takes meta bytes apart. Raises ProtocolError where they are too short or hold impossible values."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def numbers(self, count: int) -> tuple[int, ...]:
        """Unsigned 64-bit numbers."""
        return _numbers(count).unpack(self._take(8 * count))

    def number(self) -> int:
        """One unsigned 64-bit number."""
        return self.numbers(1)[0]

    def exact(self) -> int:
        """A signed integer."""
        (length,) = struct.unpack("<H", self._take(2))
        if length > MAX_EXACT_BYTES:
            raise ProtocolError(f"an exact sum of {length} bytes is longer than {MAX_EXACT_BYTES}")
        return int.from_bytes(self._take(length), "little", signed=True)

    def mask(self) -> int:
        """An unsigned bit mask."""
        (length,) = struct.unpack("<I", self._take(4))
        if length > MAX_COVERAGE_BYTES:
            raise ProtocolError(f"a coverage of {length} bytes is longer than {MAX_COVERAGE_BYTES}")
        return int.from_bytes(self._take(length), "little")

    @property
    def more(self) -> bool:
        """Whether something is left: the description of a tensor."""
        return self._at < len(self._data)

    def rest(self) -> bytes:
        """Everything that is left."""
        return self._take(len(self._data) - self._at)

    def _take(self, count: int) -> bytes:
        end = self._at + count
        if end > len(self._data):
            raise ProtocolError(f"the meta of a frame ends after {len(self._data)} bytes, {end} are needed")
        found = self._data[self._at : end]
        self._at = end
        return found


# ---------------------------------------------------------------------- scalars


def _write_non_finite(to: Writer, found: NonFinite | None) -> None:
    if found is None:
        to.numbers(0)
    else:
        to.numbers(1, found.micro_batch, found.layer)


def _read_non_finite(data: Reader) -> NonFinite | None:
    if not data.number():
        return None
    micro_batch, layer = data.numbers(2)
    return NonFinite(micro_batch=MicroBatch(micro_batch), layer=Layer(layer))


def _write_loss(to: Writer, loss: LossScalars | None) -> None:
    if loss is None:
        to.numbers(0)
        return
    to.numbers(1, loss.tokens, loss.samples).exact(loss.loss)
    _write_non_finite(to, loss.non_finite)


def _read_loss(data: Reader) -> LossScalars | None:
    if not data.number():
        return None
    tokens, samples = data.numbers(2)
    total = data.exact()
    return LossScalars(loss=total, tokens=tokens, samples=samples, non_finite=_read_non_finite(data))


def _write_scalars(to: Writer, scalars: ShardScalars) -> None:
    to.numbers(scalars.finite).exact(scalars.norm_squared)
    _write_loss(to, scalars.loss)


def _read_scalars(data: Reader) -> ShardScalars:
    finite = bool(data.number())
    norm_squared = data.exact()
    return ShardScalars(norm_squared=norm_squared, finite=finite, loss=_read_loss(data))


def _write_decision(to: Writer, decision: Decision | None) -> None:
    if decision is None:
        to.numbers(0)
        return
    to.numbers(1, decision.step, decision.finite).exact(decision.norm_squared)
    _write_loss(to, decision.loss)


def _read_decision(data: Reader) -> Decision | None:
    if not data.number():
        return None
    step, finite = data.numbers(2)
    norm_squared = data.exact()
    loss = _read_loss(data)
    if loss is None:
        raise ProtocolError(f"the decision of step {step} has no loss")
    return Decision(step=Step(step), norm_squared=norm_squared, finite=bool(finite), loss=loss)


# ---------------------------------------------------------------------- facts


def encode_fact(fact: Fact) -> tuple[FrameKind, Writer]:
    """Kind and meta of a fact; the tensor's description, if any, is added by `describe_tensor`."""
    to = Writer()
    match fact:
        case facts.Activation():
            found = fact.non_finite
            origin = (0,) if found is None else (1, found.micro_batch, found.layer)
            return FrameKind.ACTIVATION, to.numbers(fact.step, fact.micro_batch, fact.cut, *origin)
        case facts.Gradient():
            return FrameKind.GRADIENT, to.numbers(fact.step, fact.micro_batch, fact.cut)
        case facts.Partial():
            to.numbers(fact.step, fact.shard, fact.layer, fact.epoch, fact.running).mask(fact.coverage)
            _write_loss(to, fact.loss)
            return FrameKind.PARTIAL, to
        case facts.Reduced():
            to.numbers(fact.step, fact.shard)
            _write_scalars(to, fact.scalars)
            return FrameKind.REDUCED, to
        case facts.Have():
            to.numbers(fact.step, len(fact.entries))
            for shard, scalars in fact.entries:
                to.numbers(shard)
                _write_scalars(to, scalars)
            return FrameKind.HAVE, to
        case facts.Decided():
            _write_decision(to, fact.decision)
            return FrameKind.DECIDED, to
        case _:
            return _encode_copy_fact(fact, to)


def _encode_copy_fact(fact: Fact, to: Writer) -> tuple[FrameKind, Writer]:
    match fact:
        case facts.Parameters() | facts.State():
            to.numbers(fact.shard, fact.version)
            _write_decision(to, fact.decision)
            return FrameKind.PARAMETERS if isinstance(fact, facts.Parameters) else FrameKind.STATE, to
        case facts.ParametersRequest():
            return FrameKind.PARAMETERS_REQUEST, to.numbers(fact.shard)
        case facts.StateRequest():
            return FrameKind.STATE_REQUEST, to.numbers(fact.shard, fact.step)
        case _:
            raise InvariantError(f"no frame for a fact of type {type(fact).__name__}")


def decode_fact(kind: int, data: Reader) -> Fact:
    """The fact in a frame. Raises ProtocolError for anything malformed."""
    match kind:
        case FrameKind.ACTIVATION:
            step, micro_batch, cut = data.numbers(3)
            return facts.Activation(
                step=Step(step),
                micro_batch=MicroBatch(micro_batch),
                cut=Layer(cut),
                non_finite=_read_non_finite(data),
            )
        case FrameKind.GRADIENT:
            step, micro_batch, cut = data.numbers(3)
            return facts.Gradient(step=Step(step), micro_batch=MicroBatch(micro_batch), cut=Layer(cut))
        case FrameKind.PARTIAL:
            return _decode_partial(data)
        case FrameKind.REDUCED:
            step, shard = data.numbers(2)
            return facts.Reduced(step=Step(step), shard=ShardId(shard), scalars=_read_scalars(data))
        case FrameKind.HAVE:
            return _decode_have(data)
        case FrameKind.DECIDED:
            decision = _read_decision(data)
            if decision is None:
                raise ProtocolError("a decided message without a decision")
            return facts.Decided(decision=decision)
        case _:
            return _decode_copy_fact(kind, data)


def _decode_partial(data: Reader) -> Fact:
    step, shard, layer, epoch, running = data.numbers(5)
    coverage = Coverage(data.mask())
    return facts.Partial(
        step=Step(step),
        shard=ShardId(shard),
        layer=Layer(layer),
        epoch=Epoch(epoch),
        coverage=coverage,
        loss=_read_loss(data),
        running=bool(running),
    )


def _decode_have(data: Reader) -> Fact:
    step, count = data.numbers(2)
    if count > MAX_ENTRIES:
        raise ProtocolError(f"a have message names {count} shards, at most {MAX_ENTRIES} are possible")
    entries = tuple((ShardId(data.number()), _read_scalars(data)) for _ in range(count))
    return facts.Have(step=Step(step), entries=entries)


def _decode_copy_fact(kind: int, data: Reader) -> Fact:
    match kind:
        case FrameKind.PARAMETERS | FrameKind.STATE:
            shard, version = data.numbers(2)
            decision = _read_decision(data)
            made = facts.Parameters if kind == FrameKind.PARAMETERS else facts.State
            return made(shard=ShardId(shard), version=version, decision=decision)
        case FrameKind.PARAMETERS_REQUEST:
            return facts.ParametersRequest(shard=ShardId(data.number()))
        case FrameKind.STATE_REQUEST:
            shard, step = data.numbers(2)
            return facts.StateRequest(shard=ShardId(shard), step=Step(step))
        case _:
            raise ProtocolError(f"frame of unknown kind {kind}")


# ---------------------------------------------------------------------- tensors


def describe_tensor(to: Writer, tensor: Tensor) -> None:
    """Type and shape, so that `tensor_of` can make it from the payload again."""
    code = _DTYPE_CODES.get(tensor.dtype)
    if code is None or tensor.dim() > MAX_DIMENSIONS:
        raise InvariantError(f"a tensor of {tensor.dtype} with {tensor.dim()} dimensions has no place in a frame")
    to.numbers(code, tensor.dim(), *tensor.shape)


def tensor_of(data: Reader, payload: Tensor) -> Tensor:
    """The tensor in a payload (flat uint8, shared memory). Raises ProtocolError where its length does not fit."""
    code, dimensions = data.numbers(2)
    if code >= len(_DTYPES) or dimensions > MAX_DIMENSIONS:
        raise ProtocolError(f"a frame has tensor type {code} with {dimensions} dimensions")
    shape = data.numbers(dimensions)
    dtype = _DTYPES[code]
    elements = 1
    for extent in shape:
        elements *= extent
    if elements * dtype.itemsize != payload.numel():
        raise ProtocolError(f"a tensor of {shape} {dtype} came with {payload.numel()} bytes")
    if not elements:
        return torch.empty(shape, dtype=dtype)  # an empty numpy array has strides that a view refuses
    return payload.view(dtype).view(shape)


def bytes_of_tensor(tensor: Tensor) -> memoryview:
    """Bytes of a contiguous host tensor, shared memory."""
    if not tensor.numel():
        return memoryview(b"")
    data = tensor.detach()
    if data.dtype.is_floating_point and data.dtype not in _NUMPY_FLOATS:
        data = data.view(torch.int16 if data.dtype == torch.bfloat16 else torch.uint8)
    return data.numpy().data.cast("B")
