"""Blocks are asked of a host once, and again when the link to it broke."""

from types import SimpleNamespace

import torch

from elaswave.core.ids import BlockId, Layer, WorkerId
from elaswave.core.shape import CHUNK_ELEMENTS, Block, ModelShape, divide_into_shards
from elaswave.runtime.gather import BlockGather

ME, HOST = WorkerId(0), WorkerId(1)
BLOCKS = (Block(layers=(Layer(0),), elements=CHUNK_ELEMENTS),)
TWO_BLOCKS = tuple(Block(layers=(Layer(layer),), elements=CHUNK_ELEMENTS) for layer in range(2))
PLAN = SimpleNamespace(hosts_of_layer={Layer(0): (HOST,)})


def test_a_request_that_may_be_lost_is_made_again() -> None:
    asked: list[tuple[int, int, int]] = []
    shape = ModelShape(1, BLOCKS, divide_into_shards(BLOCKS, 1))
    protocol = SimpleNamespace(me=ME, job=SimpleNamespace(shape=shape), parameters={})
    model = SimpleNamespace(hosts_block=lambda _: False)
    gather = BlockGather(protocol, model, lambda *request: asked.append(request), lambda *_: None)  # type: ignore[arg-type]
    gather.want(3)
    assert gather.collect(PLAN) is None  # type: ignore[arg-type]
    assert gather.collect(PLAN) is None  # type: ignore[arg-type]
    assert asked == [(HOST, 3, 0)]
    gather.ask_again(WorkerId(7))
    gather.collect(PLAN)  # type: ignore[arg-type]
    assert len(asked) == 1
    gather.ask_again(HOST)
    gather.collect(PLAN)  # type: ignore[arg-type]
    assert asked == [(HOST, 3, 0)] * 2
    values = torch.ones(CHUNK_ELEMENTS)
    gather.received(2, BlockId(0), torch.zeros(CHUNK_ELEMENTS))
    gather.received(3, BlockId(0), values)
    assert gather.collect(PLAN) == {BlockId(0): values}  # type: ignore[arg-type]


def test_blocks_of_a_later_version_are_not_waited_for() -> None:
    """Neither those of others nor own ones, which may be the next version's when the last of the others' comes."""
    sent: list[tuple[object, ...]] = []
    shape = ModelShape(2, TWO_BLOCKS, divide_into_shards(TWO_BLOCKS, 1))
    own, others = BlockId(0), BlockId(1)
    parameters = dict.fromkeys(shape.shards_of_block[own], 3)
    protocol = SimpleNamespace(me=ME, job=SimpleNamespace(shape=shape), parameters=parameters)
    model = SimpleNamespace(hosts_block=lambda block: block == own, block=lambda _: torch.ones(CHUNK_ELEMENTS))
    plan = SimpleNamespace(hosts_of_layer={Layer(0): (ME,), Layer(1): (HOST,)})
    gather = BlockGather(protocol, model, lambda *_: None, lambda *answer: sent.append(answer))  # type: ignore[arg-type]

    gather.want(3)
    assert gather.collect(plan) is None  # type: ignore[arg-type]
    gather.gone(2, others)
    assert not gather.lost
    gather.gone(3, others)
    assert gather.lost

    gather.want(3)
    assert not gather.lost
    assert gather.collect(plan) is None  # type: ignore[arg-type]
    parameters.update(dict.fromkeys(parameters, 4))
    gather.received(3, others, torch.ones(CHUNK_ELEMENTS))
    assert gather.collect(plan) is None  # type: ignore[arg-type]
    assert gather.lost

    gather.requested(HOST, 3, own)
    gather.answer()
    assert sent == [(HOST, 3, own, None)]


def test_a_whole_model_of_the_wanted_version_is_collected() -> None:
    shape = ModelShape(1, BLOCKS, divide_into_shards(BLOCKS, 1))
    protocol = SimpleNamespace(
        me=ME, job=SimpleNamespace(shape=shape), parameters=dict.fromkeys(shape.shards_of_block[BlockId(0)], 4)
    )
    model = SimpleNamespace(hosts_block=lambda _: True, block=lambda _: torch.ones(CHUNK_ELEMENTS))
    plan = SimpleNamespace(hosts_of_layer={Layer(0): (ME,)})
    gather = BlockGather(protocol, model, lambda *_: None, lambda *_: None)  # type: ignore[arg-type]
    gather.want(3)
    assert gather.collect(plan) is None  # type: ignore[arg-type]
    assert gather.lost
    gather.want(4)
    assert gather.collect(plan) is not None  # type: ignore[arg-type]
