"""What the model looks like to the planner: layers, parameter blocks and shards; sizes only, no tensors."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from elaswave.core.ids import BlockId, Layer, ShardId
from elaswave.errors import ConfigError

CHUNK_ELEMENTS = 1024
"""Shard boundaries are multiples of this: elementwise kernels then never run their tail code inside a block,
and gradient norms are summed over the same pieces whatever the layout."""

SHARD_ELEMENTS = 65536
"""Least length of a shard by default: below it, handling its messages costs more than moving its elements."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Flat parameters that are reduced and updated together.

    Invariants: `elements` is a multiple of CHUNK_ELEMENTS (zero-padded), 0 only for layers without parameters;
    `layers` is ascending and has more than one entry only for a tied parameter.
    """

    layers: tuple[Layer, ...]
    elements: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Elements `start` to `stop` (exclusive) of one block."""

    block: BlockId
    start: int
    stop: int

    @property
    def elements(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class ModelShape:
    """All blocks and their division into shards; fixed for the life of a job.

    Every block has at least one shard, also an empty block: the first shard of the last layer carries the loss.
    """

    layers: int
    blocks: tuple[Block, ...]
    shards: tuple[Shard, ...]
    shards_of_layer: tuple[tuple[ShardId, ...], ...] = field(init=False, compare=False, repr=False)
    shards_of_block: tuple[tuple[ShardId, ...], ...] = field(init=False, compare=False, repr=False)
    blocks_of_layer: tuple[tuple[BlockId, ...], ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        by_block: list[list[ShardId]] = [[] for _ in self.blocks]
        for index, shard in enumerate(self.shards):
            by_block[shard.block].append(ShardId(index))
        by_layer: list[list[BlockId]] = [[] for _ in range(self.layers)]
        for index, block in enumerate(self.blocks):
            for layer in block.layers:
                by_layer[layer].append(BlockId(index))
        object.__setattr__(self, "shards_of_block", tuple(map(tuple, by_block)))
        object.__setattr__(self, "blocks_of_layer", tuple(map(tuple, by_layer)))
        shards = (tuple(s for block in blocks for s in by_block[block]) for blocks in by_layer)
        object.__setattr__(self, "shards_of_layer", tuple(shards))

    @property
    def loss_shard(self) -> ShardId:
        """The shard whose partial sums carry loss, tokens, samples and flags."""
        return self.shards_of_layer[self.layers - 1][0]

    def layers_of_shard(self, shard: ShardId) -> tuple[Layer, ...]:
        """Layers that contribute to the gradient of this shard; more than one for a tied parameter."""
        return self.blocks[self.shards[shard].block].layers


def divide_into_shards(blocks: tuple[Block, ...], parts: int, least: int = CHUNK_ELEMENTS) -> tuple[Shard, ...]:
    """Cut every block into at most `parts` slices of nearly equal length, on multiples of CHUNK_ELEMENTS.

    A block of less than 2 * `least` elements is not cut, and slices are about `least` long or longer. Raises
    ConfigError where a block has a length that is no multiple of CHUNK_ELEMENTS.
    """
    return tuple(shard for index, block in enumerate(blocks) for shard in _cut(BlockId(index), block, parts, least))


def _cut(index: BlockId, block: Block, parts: int, least: int) -> Iterator[Shard]:
    if block.elements % CHUNK_ELEMENTS:
        raise ConfigError(f"block {index} has {block.elements} elements: pad it to a multiple of {CHUNK_ELEMENTS}")
    chunks = block.elements // CHUNK_ELEMENTS
    count = max(1, min(parts, chunks, block.elements // least))
    edges = [chunks * part // count * CHUNK_ELEMENTS for part in range(count + 1)]
    for start, stop in pairwise(edges):
        yield Shard(block=index, start=start, stop=stop)
