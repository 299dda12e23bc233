"""Flat blocks: where each parameter lies."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elaswave.core.events import ParameterDescription
from elaswave.core.ids import Layer
from elaswave.core.parameters import ALIGNMENT_ELEMENTS, block_layout
from elaswave.core.shape import CHUNK_ELEMENTS
from elaswave.errors import ConfigError

shapes = st.lists(st.integers(0, 40), max_size=3).map(tuple)
layers = st.lists(st.lists(shapes, max_size=5), min_size=2, max_size=5)


def described(
    model: list[list[tuple[int, ...]]], tied: frozenset[int] = frozenset()
) -> tuple[tuple[ParameterDescription, ...], ...]:
    """Parameters named by their place; in each layer of `tied`, one more of the same shape in tie group 1."""
    return tuple(
        tuple(
            [ParameterDescription(name=f"p{place}", shape=shape) for place, shape in enumerate(parameters)]
            + [ParameterDescription(name="shared", shape=(7, 9), tie_group=1)] * (index in tied)
        )
        for index, parameters in enumerate(model)
    )


@given(layers, st.booleans())
def test_parameters_lie_apart_aligned_and_in_order(model: list[list[tuple[int, ...]]], with_tie: bool) -> None:
    tied = frozenset({0, len(model) - 1}) if with_tie else frozenset[int]()
    description = described(model, tied)
    blocks, placements = block_layout(description)
    assert [block.layers for block in blocks[: len(model)]] == [(index,) for index in range(len(model))]
    assert list(placements) == [(index, found.name) for index, layer in enumerate(description) for found in layer]
    for index, block in enumerate(blocks):
        assert block.elements % CHUNK_ELEMENTS == 0
        owners = {index} if index < len(model) else {0}
        places = [place for (layer, _), place in placements.items() if place.block == index and layer in owners]
        stop = 0
        for place in places:
            assert place.offset % ALIGNMENT_ELEMENTS == 0
            assert stop <= place.offset < stop + ALIGNMENT_ELEMENTS
            assert place.elements == math.prod(place.shape)
            stop = place.stop
        assert stop <= block.elements < stop + ALIGNMENT_ELEMENTS + CHUNK_ELEMENTS
        assert (block.elements == 0) == (stop == 0)


def test_a_tied_parameter_has_a_block_of_its_own_after_all_layers() -> None:
    blocks, placements = block_layout(described([[(3,)], [(5,)], []], frozenset({0, 2})))
    assert [(block.layers, block.elements) for block in blocks] == [
        ((0,), 1024), ((1,), 1024), ((2,), 0), ((0, 2), 1024)
    ]  # fmt: skip
    assert placements[Layer(0), "shared"] == placements[Layer(2), "shared"]
    assert placements[Layer(0), "shared"].block == 3
    assert placements[Layer(0), "p0"].block == 0


def test_a_tie_group_in_one_layer_only_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"tie group 1 names layers \[1\]"):
        block_layout(described([[], []], frozenset({1})))


def test_tied_parameters_of_different_shapes_are_refused() -> None:
    one = ParameterDescription(name="a", shape=(2, 3), tie_group=1)
    two = ParameterDescription(name="b", shape=(3, 2), tie_group=1)
    with pytest.raises(ConfigError, match=r"'a' of layer 0 has shape \(2, 3\) and 'b' of layer 1 has shape \(3, 2\)"):
        block_layout(((one,), (two,)))
