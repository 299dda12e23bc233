"""Hosted layers: parameters as views of blocks."""

import pytest
import torch
from numerics_harness import TIED, Bench, Embedding, Mixer, same_bits, small_job
from torch import nn

from elaswave.core.ids import BlockId, Layer
from elaswave.core.shape import Shard
from elaswave.errors import InvariantError
from elaswave.runtime.description import build_layer
from elaswave.runtime.model import initial_blocks, view_of


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_are_aligned_views_of_their_block(dtype: str) -> None:
    bench = Bench(small_job(parameter_dtype=dtype))
    hosted = bench.model.layer(Layer(1))
    block = bench.model.block(BlockId(1))
    fresh = build_layer(bench.job, Layer(1))
    for (name, parameter), initial in zip(hosted.module.named_parameters(), fresh.parameters(), strict=True):
        place = bench.layout.placements[Layer(1), name]
        assert parameter.dtype == bench.model.dtype
        assert parameter.data_ptr() == block.data_ptr() + place.offset * block.element_size()
        assert parameter.data_ptr() % 64 == 0
        assert torch.equal(parameter, initial.to(parameter.dtype))
    assert hosted.module.training
    used = sum(place.elements for place in bench.layout.of_layer(Layer(1)).values())
    assert int((block != 0).sum()) <= used


def test_installed_parameters_are_what_layers_use() -> None:
    bench = Bench(small_job())
    before = bench.run()
    shard = Shard(block=BlockId(3), start=0, stop=1024)
    bench.model.install(shard, torch.zeros(1024))
    assert not bench.model.layer(Layer(3)).parameters[0].any()
    after = bench.run()
    assert not same_bits(before, after)
    assert float(after[-2]) == pytest.approx(torch.tensor(32.0).log().item())


@pytest.mark.parametrize("wrong", [torch.zeros(1000), torch.zeros(1024, dtype=torch.bfloat16)])
def test_parameters_that_do_not_fit_are_a_bug(wrong: torch.Tensor) -> None:
    bench = Bench(small_job())
    with pytest.raises(InvariantError, match=r"must be 1024 of torch\.float32"):
        bench.model.install(Shard(block=BlockId(3), start=0, stop=1024), wrong)


def test_hosting_builds_what_is_missing_and_frees_the_rest() -> None:
    bench = Bench(small_job(tied=TIED))
    tied = BlockId(4)
    kept = bench.model.layer(Layer(1))
    bench.model.install(Shard(block=tied, start=0, stop=1024), torch.full((1024,), 3.0))
    bench.model.host([Layer(0), Layer(1)])
    assert bench.model.layers == (0, 1)
    assert bench.model.layer(Layer(1)) is kept
    assert not bench.model.hosts_block(BlockId(2))
    with pytest.raises(InvariantError, match="block 2 is not hosted"):
        bench.model.block(BlockId(2))
    # The second layer of the tie group comes back and finds the block's values, not its own initial ones.
    bench.model.host([Layer(0), Layer(3)])
    assert bool((bench.model.layer(Layer(3)).parameters[0] == 3.0).all())
    bench.model.host([])
    assert bench.model.layers == ()
    assert not bench.model.hosts_block(tied)


def test_initial_blocks_are_the_layers_own_and_a_tie_starts_as_its_first_layer() -> None:
    job = small_job(tied=TIED, parameter_dtype="bfloat16")
    bench = Bench(job)
    found = dict(initial_blocks(job, bench.layout, [BlockId(4), BlockId(2), BlockId(0)]))
    assert set(found) == {0, 2, 4}
    assert all(values.dtype == torch.float32 for values in found.values())
    assert found[BlockId(0)].numel() == 0
    table = build_layer(job, Layer(0)).table.weight
    assert torch.equal(found[BlockId(4)][: 32 * 16], table.data.flatten())
    mixer = build_layer(job, Layer(2))
    for name, parameter in mixer.named_parameters():
        place = bench.layout.placements[Layer(2), name]
        assert torch.equal(view_of(found[BlockId(2)], place), parameter.data)
    # What is hosted and what is published at version 0 are the same bits.
    assert same_bits([found[BlockId(2)].bfloat16()], [bench.model.block(BlockId(2))])


class Counted(Mixer):
    built = 0

    def __init__(self) -> None:
        super().__init__()
        Counted.built += not self.up.weight.is_meta


def test_each_layer_is_built_once_and_only_where_it_is_wanted() -> None:
    job = small_job(layers=[Embedding, Counted, Counted, nn.Linear(16, 32)])
    bench = Bench(job)
    Counted.built = 0
    list(initial_blocks(job, bench.layout, [BlockId(0), BlockId(2)]))
    assert Counted.built == 1
    bench.model.host([Layer(0)])
    bench.model.host([Layer(0), Layer(1)])
    bench.model.host([Layer(0), Layer(1)])
    assert Counted.built == 2
