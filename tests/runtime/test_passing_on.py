"""A worker's part in a ring, on tensors: what it adds to the sum that came, and what it refuses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elaswave.core.facts import LossScalars, Partial
from elaswave.core.ids import BlockId, Coverage, Epoch, Layer, MicroBatch, ShardId, Step, WorkerId
from elaswave.core.protocol.effects import PassOn
from elaswave.core.protocol.state import SumKey
from elaswave.core.shape import CHUNK_ELEMENTS, Block, ModelShape, divide_into_shards
from elaswave.errors import InvariantError
from elaswave.job import AdamW
from elaswave.runtime.accumulation import Exact64Accumulation
from elaswave.runtime.codec import Reader, decode_fact, encode_fact, tensor_of
from elaswave.runtime.contribution import whole
from elaswave.runtime.hops import LayerContribution
from elaswave.runtime.host_memory import plain_memory
from elaswave.runtime.shell import ProtocolShell, ShellParts

STEP, LAYER = Step(3), Layer(0)
BLOCKS = (Block(layers=(LAYER,), elements=2 * CHUNK_ELEMENTS),)
SHAPE = ModelShape(1, BLOCKS, divide_into_shards(BLOCKS, 2))


class Asking:
    """A protocol that asks for what it was told to ask for."""

    def __init__(self, effect: PassOn) -> None:
        self._effects = [effect]

    def take_effects(self) -> list[PassOn]:
        taken, self._effects = self._effects, []
        return taken


class Sent:
    """Links that keep what is sent."""

    def __init__(self) -> None:
        self.frames: list[tuple[int, int, bytes, bytes]] = []

    def send(
        self, peer: int, kind: int, meta: bytes, data: memoryview, *, copy: bool = False, more: bool = False
    ) -> None:
        self.frames.append((peer, kind, bytes(meta), bytes(data)))


class Bare:
    """Of a job only what the shell reads when it is made."""

    optimizer = AdamW(lr=0.1)
    parameter_dtype = "float32"


def contribution(micro_batch: int) -> torch.Tensor:
    return torch.arange(2 * CHUNK_ELEMENTS, dtype=torch.float32) + 1000 * micro_batch


def shell_with(effect: PassOn, sums: dict[int, tuple[int, ...]]) -> tuple[ProtocolShell, Sent]:
    """A shell with accumulators: micro-batches by assignment epoch."""
    links = Sent()
    parts = ShellParts(
        job=Bare(),
        shape=SHAPE,
        protocol=Asking(effect),
        model=None,
        runner=None,
        accumulation=Exact64Accumulation(quantum_exponent=-20, micro_batches=8),
        links=links,
        memory=plain_memory,
    )  # type: ignore[arg-type]
    shell = ProtocolShell(parts, {}, lambda step, phase: None, lambda decision, update: None)
    for epoch, micro_batches in sums.items():
        for micro_batch in micro_batches:
            made = LayerContribution(layer=LAYER, blocks={BlockId(0): whole(contribution(micro_batch))})
            shell.accumulate(MicroBatch(micro_batch), SumKey(STEP, LAYER, Epoch(epoch)), made)
    return shell, links


def asked(covered: int, epochs: tuple[int, ...], before: int, payload: object = None) -> PassOn:
    fact = Partial(step=STEP, shard=ShardId(1), layer=LAYER, epoch=Epoch(9), coverage=Coverage(covered), running=True)
    return PassOn(
        to=WorkerId(5), fact=fact, accumulators=tuple(map(Epoch, epochs)), before=Coverage(before), payload=payload
    )


def sum_of(*micro_batches: int) -> torch.Tensor:
    return sum(contribution(m)[CHUNK_ELEMENTS:].double() for m in micro_batches)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("sums", "came"), [({1: (0,)}, ()), ({1: (0,), 4: (3, 5)}, ()), ({1: (0,)}, (2,)), ({1: (0,), 4: (3,)}, (1, 2))]
)
def test_own_sums_are_added_to_what_came(sums: dict[int, tuple[int, ...]], came: tuple[int, ...]) -> None:
    everything = [*came, *(m for found in sums.values() for m in found)]
    before = sum(1 << m for m in came)
    payload = sum_of(*came) if came else None
    shell, links = shell_with(asked(sum(1 << m for m in everything), tuple(sums), before, payload), sums)
    shell.perform()
    [(peer, kind, meta, data)] = links.frames
    reader = Reader(meta)
    fact = decode_fact(kind, reader)
    assert isinstance(fact, Partial)
    assert (peer, fact.running, fact.epoch, fact.coverage) == (5, True, 9, sum(1 << m for m in everything))
    found = tensor_of(reader, torch.frombuffer(bytearray(data), dtype=torch.uint8))
    assert torch.equal(found, sum_of(*everything))


def test_sums_that_overlap_or_are_not_what_is_told_are_refused() -> None:
    for effect, text in (
        (asked(0b11, (1,), 0b01, sum_of(0)), "they overlap"),
        (asked(0b111, (1,), 0, None), "the protocol says 0x7"),
        (asked(0b11, (2,), 0, None), "no accumulator"),
    ):
        shell, links = shell_with(effect, {1: (0, 1)})
        with pytest.raises(InvariantError, match=text):
            shell.perform()
        assert links.frames == []


partials = st.builds(
    Partial,
    step=st.integers(0, 2**40).map(Step),
    shard=st.integers(0, 2**20).map(ShardId),
    layer=st.integers(0, 2**15).map(Layer),
    epoch=st.integers(0, 2**40).map(Epoch),
    coverage=st.integers(0, 2**300).map(Coverage),
    loss=st.none() | st.builds(LossScalars, tokens=st.integers(0, 2**40)),
    running=st.booleans(),
)


@given(partials)
def test_partial_sums_keep_what_they_are_on_the_wire(fact: Partial) -> None:
    kind, meta = encode_fact(fact)
    assert decode_fact(kind, Reader(bytes(meta.finish()))) == fact
