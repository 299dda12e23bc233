"""Contributions: every gradient at its place in the block, zero elsewhere, whatever autograd left."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from elaswave.core.events import ParameterDescription
from elaswave.core.ids import BlockId, Layer
from elaswave.core.parameters import block_layout
from elaswave.runtime.contribution import LARGE_ELEMENTS, GradientGatherer
from elaswave.runtime.model import view_of

sizes = st.sampled_from([0, 1, 5, 64, 1000, LARGE_ELEMENTS - 1, LARGE_ELEMENTS, LARGE_ELEMENTS + 3])


@given(st.lists(sizes, min_size=1, max_size=6), st.data())
def test_gradients_lie_at_their_places_and_all_else_is_zero(elements: list[int], data: st.DataObject) -> None:
    parameters = tuple(ParameterDescription(name=f"p{index}", shape=(count,)) for index, count in enumerate(elements))
    layout = block_layout((parameters,))
    places = [layout.of_layer(Layer(0))[parameter.name] for parameter in parameters]
    in_place = data.draw(st.booleans())
    gatherer = GradientGatherer(layout, places, torch.float32, torch.device("cpu"), in_place=in_place)
    for turn in range(2):
        absent = data.draw(st.sets(st.sampled_from(range(len(elements)))))
        gradients: list[Tensor | None] = [
            None if index in absent else torch.full((count,), 10.0 * turn + index + 1)
            for index, count in enumerate(elements)
        ]
        expected = torch.zeros(layout.blocks[0].elements)
        for place, gradient in zip(places, gradients, strict=True):
            if gradient is not None:
                view_of(expected, place).copy_(gradient)
        found = gatherer.gather(gradients)[BlockId(0)]
        assert list(found.spans.starts) == sorted(found.spans.starts)
        assert found.elements == expected.numel()
        assert torch.equal(found.flat(), expected)


@pytest.mark.parametrize("in_place", [False, True])
def test_large_gradients_are_not_copied_and_strides_and_sparse_ones_do_not_show(in_place: bool) -> None:
    shape = (300, 300)
    parameter = ParameterDescription(name="weight", shape=shape)
    layout = block_layout(((parameter,),))
    places = [layout.of_layer(Layer(0))["weight"]]
    gatherer = GradientGatherer(layout, places, torch.float32, torch.device("cpu"), in_place=in_place)
    gradient = torch.randn(shape)
    found = gatherer.gather([gradient])[BlockId(0)]
    values = found.values[0]
    assert found.spans.starts[0] == 0 and values is not None
    assert values.data_ptr() == gradient.data_ptr()
    for same in (gradient.t().contiguous().t(), gradient.to_sparse()):
        assert torch.equal(gatherer.gather([same])[BlockId(0)].flat(), gatherer.gather([gradient])[BlockId(0)].flat())
