"""Shards against a naive painting of their blocks; tied blocks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elaswave.core.ids import BlockId, Layer
from elaswave.core.layout import Layout
from elaswave.core.shape import CHUNK_ELEMENTS, Block, ModelShape, divide_into_shards
from elaswave.errors import ConfigError


@pytest.mark.parametrize(("flag", "degrees"), [("--dp", (0, 1)), ("--pp", (1, 0)), ("--pp", (2, -3))])
def test_degrees_below_one_are_refused(flag: str, degrees: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=flag):
        Layout(dp=degrees[0], pp=degrees[1])


def test_tensor_parallelism_is_refused() -> None:
    with pytest.raises(ConfigError, match="--tp is 2"):
        Layout(dp=1, pp=1, tp=2)


@given(chunks=st.lists(st.integers(0, 40), min_size=1, max_size=5), parts=st.integers(1, 9))
def test_shards_tile_their_blocks(chunks: list[int], parts: int) -> None:
    blocks = tuple(Block(layers=(Layer(index),), elements=count * CHUNK_ELEMENTS) for index, count in enumerate(chunks))
    shape = ModelShape(len(blocks), blocks, divide_into_shards(blocks, parts))
    for index, block in enumerate(blocks):
        found = [shape.shards[shard] for shard in shape.shards_of_block[index]]
        covered = np.zeros(block.elements, dtype=int)
        for shard in found:
            covered[shard.start : shard.stop] += 1
            assert shard.block == BlockId(index)
            assert shard.start % CHUNK_ELEMENTS == shard.stop % CHUNK_ELEMENTS == 0
        assert (covered == 1).all()
        assert 1 <= len(found) <= parts
        sizes = [shard.elements for shard in found]
        assert max(sizes) - min(sizes) <= CHUNK_ELEMENTS
        assert len(found) == max(1, min(parts, chunks[index]))
    assert shape.loss_shard == shape.shards_of_layer[len(blocks) - 1][0]


def test_blocks_must_be_padded() -> None:
    with pytest.raises(ConfigError, match="pad it to a multiple"):
        divide_into_shards((Block(layers=(Layer(0),), elements=CHUNK_ELEMENTS + 1),), 2)


def test_a_tied_block_belongs_to_all_its_layers() -> None:
    blocks = (
        Block(layers=(Layer(0),), elements=0),
        Block(layers=(Layer(1),), elements=CHUNK_ELEMENTS),
        Block(layers=(Layer(0), Layer(1)), elements=2 * CHUNK_ELEMENTS),
    )
    shape = ModelShape(2, blocks, divide_into_shards(blocks, 2))
    assert shape.shards_of_layer == ((0, 2, 3), (1, 2, 3))
    assert shape.layers_of_shard(shape.shards_of_block[2][1]) == (0, 1)
    assert shape.blocks_of_layer == ((0, 2), (1, 2))
