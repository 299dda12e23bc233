"""Where each parameter lies: parameters of a layer flattened into blocks; arithmetic only, no tensors."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from elaswave.core.events import ParameterDescription
from elaswave.core.ids import BlockId, Layer
from elaswave.core.shape import CHUNK_ELEMENTS, Block
from elaswave.errors import ConfigError

ALIGNMENT_ELEMENTS = 64
"""Parameters start at multiples of this: 256 bytes in float32, 128 in bfloat16, so kernels see the alignment of a
tensor of its own whatever stands before it."""

LayerParameters = tuple[ParameterDescription, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Place of one parameter of one layer: elements `offset` and following of a block, row-major."""

    block: BlockId
    offset: int
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def stop(self) -> int:
        """First element after the parameter."""
        return self.offset + self.elements


class BlockLayout(NamedTuple):
    """All blocks of a model and the place of every parameter.

    blocks: one per layer, in order (0 elements where the layer has no parameters of its own), then one per tie group.
    placements: by (layer, name), in canonical order: layers ascending, names as the layer lists them. A tied parameter
    has an entry for each of its layers, all at the same place.
    """

    blocks: tuple[Block, ...]
    placements: Mapping[tuple[Layer, str], Placement]

    def of_layer(self, layer: Layer) -> dict[str, Placement]:
        """Places of the parameters of one layer, by name."""
        return {name: place for (owner, name), place in self.placements.items() if owner == layer}


def block_layout(layers: tuple[LayerParameters, ...]) -> BlockLayout:
    """Place the parameters of all layers.

    Raises ConfigError where members of a tie group differ in shape, or a group does not span two layers.
    """
    blocks: list[Block] = []
    placements: dict[tuple[Layer, str], Placement] = {}
    for index, parameters in enumerate(layers):
        offset = 0
        for parameter in parameters:
            if parameter.tie_group == 0:
                place = Placement(block=BlockId(index), offset=offset, shape=parameter.shape)
                placements[Layer(index), parameter.name] = place
                offset = _round_up(place.stop, ALIGNMENT_ELEMENTS)
        blocks.append(Block(layers=(Layer(index),), elements=_round_up(offset, CHUNK_ELEMENTS)))
    for group, members in sorted(_tie_groups(layers).items()):
        block, place = _tied_block(group, members, BlockId(len(blocks)))
        blocks.append(block)
        placements.update({(layer, parameter.name): place for layer, parameter in members})
    canonical = [(Layer(index), parameter.name) for index, found in enumerate(layers) for parameter in found]
    return BlockLayout(tuple(blocks), {key: placements[key] for key in canonical})


def _tie_groups(layers: Iterable[LayerParameters]) -> dict[int, list[tuple[Layer, ParameterDescription]]]:
    groups: dict[int, list[tuple[Layer, ParameterDescription]]] = {}
    for index, parameters in enumerate(layers):
        for parameter in parameters:
            if parameter.tie_group:
                groups.setdefault(parameter.tie_group, []).append((Layer(index), parameter))
    return groups


def _tied_block(
    group: int, members: list[tuple[Layer, ParameterDescription]], index: BlockId
) -> tuple[Block, Placement]:
    layers = tuple(layer for layer, _ in members)
    if len(layers) < 2 or len(set(layers)) < len(layers):  # noqa: PLR2004
        raise ConfigError(
            f"tie group {group} names layers {list(layers)}: it must name one parameter in each of two or more layers"
        )
    first_layer, first = members[0]
    for layer, parameter in members[1:]:
        if parameter.shape != first.shape:
            raise ConfigError(
                f"tie group {group}: {first.name!r} of layer {first_layer} has shape {first.shape} and "
                f"{parameter.name!r} of layer {layer} has shape {parameter.shape}: they must be equal"
            )
    place = Placement(block=index, offset=0, shape=first.shape)
    return Block(layers=layers, elements=_round_up(place.elements, CHUNK_ELEMENTS)), place


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
