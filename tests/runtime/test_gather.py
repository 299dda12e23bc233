"""Blocks are asked of a host once, and again when the link to it broke."""

from types import SimpleNamespace

import torch

from elaswave.core.ids import BlockId, Layer, WorkerId
from elaswave.core.shape import CHUNK_ELEMENTS, Block, ModelShape, divide_into_shards
from elaswave.runtime.gather import BlockGather

ME, HOST = WorkerId(0), WorkerId(1)
BLOCKS = (Block(layers=(Layer(0),), elements=CHUNK_ELEMENTS),)
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
