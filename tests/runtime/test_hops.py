"""Hops: the same bits wherever they are cut, whatever ran before, and however their inputs came."""

import hashlib
import itertools
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from numerics_harness import TIED, Bench, Tokens, hop, in_fresh_process, same_bits, small_job
from torch import Tensor, nn
from torch.nn import functional

from elaswave.core.exact import exact_from_float, exact_to_float
from elaswave.core.facts import NonFinite
from elaswave.core.ids import BlockId, Layer, MicroBatch, Step
from elaswave.errors import InvariantError, UserCodeError
from elaswave.runtime import hops
from elaswave.runtime.device import canonical, configure_numerics
from elaswave.runtime.hops import LayerContribution

VARIANTS = [
    pytest.param({}, id="float32"),
    pytest.param({"parameter_dtype": "bfloat16"}, id="bfloat16"),
    pytest.param({"tied": TIED}, id="tied"),
    pytest.param({"parameter_dtype": "bfloat16", "tied": TIED, "recompute": True}, id="all"),
]


@pytest.fixture(autouse=True)
def _numerics() -> None:
    configure_numerics()


def misaligned(tensor: Tensor) -> Tensor:
    """The same values one element off, as a received buffer may lie."""
    room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    moved = room[1:].view(tensor.shape)
    assert moved.data_ptr() % 64
    return moved.copy_(tensor)


def strided(tensor: Tensor) -> Tensor:
    """The same values with the last two dimensions the other way round in memory."""
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def odd_stride_of_one(tensor: Tensor) -> Tensor:
    """Contiguous by torch's own account, but with another stride where the length is 1."""
    return tensor.as_strided(tensor.shape, (12345, *tensor.stride()[1:]))


def flat(part: LayerContribution) -> dict[BlockId, Tensor]:
    return {block: gradient.flat() for block, gradient in part.blocks.items()}


# ------------------------------------------------------------------ placement does not show


@pytest.mark.parametrize("changes", VARIANTS)
@pytest.mark.parametrize("cuts", [(1,), (2,), (3,), (1, 2, 3)])
def test_cuts_do_not_show(changes: dict[str, object], cuts: tuple[int, ...]) -> None:
    bench = Bench(small_job(**changes))
    assert same_bits(bench.run(cuts), bench.run())


@pytest.mark.parametrize("changes", VARIANTS)
@pytest.mark.parametrize("carry", [misaligned, strided, torch.clone])
def test_how_a_value_lies_in_memory_does_not_show(
    changes: dict[str, object], carry: Callable[[Tensor], Tensor]
) -> None:
    bench = Bench(small_job(**changes))
    assert same_bits(bench.run((1, 2, 3), carry=carry), bench.run())


def test_strides_at_dimensions_of_length_one_do_not_show() -> None:
    bench = Bench(small_job(micro_batch=1))
    assert same_bits(bench.run((1, 2, 3), carry=odd_stride_of_one), bench.run())


def memory_of(tensor: Tensor) -> tuple[object, ...]:
    return (*tensor.stride(), tensor.data_ptr() % 64)


class SeesMemory(torch.autograd.Function):
    """A kernel that notices how its input, and in backward its gradient, lie in memory."""

    seen: ClassVar[list[tuple[object, ...]]] = []

    @staticmethod
    def forward(ctx: object, value: Tensor) -> Tensor:
        SeesMemory.seen.append(memory_of(value))
        # Gives what lies in memory otherwise, and so does its backward pass.
        return strided(misaligned(value))

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        SeesMemory.seen.append(memory_of(gradient))
        return strided(misaligned(gradient))


class Sensitive(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return SeesMemory.apply(value)


@pytest.mark.parametrize("carry", [misaligned, strided, torch.clone])
@pytest.mark.parametrize("cuts", [(), (1, 2, 3), (2,)])
def test_layers_see_rows_in_order_and_aligned(cuts: tuple[int, ...], carry: Callable[[Tensor], Tensor]) -> None:
    bench = Bench(small_job(layers=[PlainEmbedding, Sensitive, Sensitive, lambda: nn.Linear(16, 32)]))
    SeesMemory.seen.clear()
    bench.run(cuts, carry=carry)
    assert SeesMemory.seen == [(128, 16, 1, 0)] * 4


def test_numerics_are_configured() -> None:
    torch.set_num_threads(2)
    configure_numerics()
    assert torch.get_num_threads() == 1
    assert torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("changes", VARIANTS)
def test_what_ran_before_does_not_show(changes: dict[str, object]) -> None:
    bench = Bench(small_job(**changes))
    first = bench.run(micro_batch=1)
    torch.manual_seed(99)
    bench.run((2,), micro_batch=3)
    torch.rand(7)
    # Two micro-batches in flight, as in a pipeline.
    bench.runner.forward(hop(0, 4, micro_batch=2), None)
    assert same_bits(bench.run(micro_batch=1), first)
    assert same_bits(Bench(small_job(**changes)).run(micro_batch=1), first)


def test_recomputation_gives_the_same_bits_and_keeps_only_inputs() -> None:
    plain, again = Bench(small_job()), Bench(small_job(recompute=True))
    assert same_bits(again.run((2,)), plain.run((2,)))
    again.runner.forward(hop(0, 4), None)
    (kept,) = again.runner._kept.values()
    assert not any(found.results for found in kept)


def test_steps_micro_batches_and_seeds_do_show() -> None:
    runs = [
        Bench(small_job(seed=seed, data=Constant())).run(step=step, micro_batch=micro_batch)[-2].item()
        for seed, step, micro_batch in [(5, 0, 0), (5, 1, 0), (5, 0, 1), (6, 0, 0)]
    ]
    assert len(set(runs)) == 4


class Constant(Tokens):
    """Equal samples: only the dropout of layers can make a difference."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        del index
        return torch.arange(8), torch.arange(8)


def digest_of_hops() -> str:
    digest = hashlib.sha256()
    for dtype in ("float32", "bfloat16"):
        bench = Bench(small_job(parameter_dtype=dtype, tied=TIED))
        for tensor in bench.run((2,), step=1, micro_batch=2):
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


OTHER_THREAD = """
import threading
from elaswave.runtime.device import configure_numerics
import test_hops
configure_numerics()
thread = threading.Thread(target=lambda: print(test_hops.digest_of_hops()))
thread.start()
thread.join()
"""


def test_another_process_and_thread_give_the_same_bits() -> None:
    other = in_fresh_process(OTHER_THREAD, OMP_NUM_THREADS="2", PYTHONHASHSEED="7")
    assert other.strip() == digest_of_hops()


# ------------------------------------------------------------------ what is computed


def test_contributions_and_loss_are_those_of_plain_autograd() -> None:
    job = small_job(layers=[PlainEmbedding, lambda: nn.Linear(16, 16), lambda: nn.Linear(16, 32)], steps=1)
    bench = Bench(job)
    *parts, _, _ = bench.run((1,), micro_batch=3)
    layers = [bench.model.layer(Layer(index)) for index in range(3)]
    data = bench.loader.load(Step(0), MicroBatch(3))
    loss = job.loss(nn.Sequential(*(layer.module for layer in layers))(data.input), data.target)
    for layer, part in zip(layers, parts, strict=True):
        gradients = torch.autograd.grad(loss, layer.parameters, retain_graph=True)
        flat = torch.zeros_like(part)
        offset = 0
        for gradient in gradients:
            flat[offset : offset + gradient.numel()] = gradient.reshape(-1)
            offset += -(-gradient.numel() // 64) * 64
        assert torch.allclose(part, flat, atol=1e-7)
    done = bench.runner.forward(hop(0, 3, micro_batch=3), None)
    assert done.loss is not None
    assert done.loss.loss == exact_from_float(loss.item())
    assert (done.loss.tokens, done.loss.samples) == (16, data.samples)


class PlainEmbedding(nn.Embedding):
    def __init__(self) -> None:
        super().__init__(32, 16)


def test_tied_layers_contribute_apart() -> None:
    bench = Bench(small_job(tied=TIED))
    block = bench.layout.placements[Layer(0), "table.weight"].block
    bench.runner.forward(hop(0, 4), None)
    back = bench.runner.backward(hop(0, 4), None)
    by_layer = {part.layer: flat(part) for part in back.contributions}
    assert block in by_layer[Layer(0)]
    assert block in by_layer[Layer(3)]
    assert block not in by_layer[Layer(1)]
    assert not torch.equal(by_layer[Layer(0)][block], by_layer[Layer(3)][block])
    first, last = bench.model.layer(Layer(0)).parameters[0], bench.model.layer(Layer(3)).parameters[0]
    assert first is not last
    assert first.data_ptr() == last.data_ptr() == bench.model.block(block).data_ptr()


class Partly(nn.Module):
    """Uses one of two parameters, and its input only where it is told to."""

    def __init__(self, *, use_input: bool = True) -> None:
        super().__init__()
        self.used = nn.Parameter(torch.ones(16))
        self.unused = nn.Parameter(torch.ones(5))
        self.use_input = use_input

    def forward(self, value: Tensor) -> Tensor:
        return (value if self.use_input else torch.ones_like(value)) * self.used


def test_what_takes_no_part_has_gradient_zero() -> None:
    layers = [PlainEmbedding, Partly, lambda: Partly(use_input=False), lambda: nn.Linear(16, 32)]
    bench = Bench(small_job(layers=layers))
    sevens = [torch.full_like(parameter, 7.0) for parameter in bench.model.layer(Layer(1)).parameters]
    bench.model.layer(Layer(1)).gradients.gather(sevens)
    bench.runner.forward(hop(1, 4), torch.ones(2, 8, 16))
    back = bench.runner.backward(hop(1, 4), None)
    assert back.input_gradient is not None
    assert not back.input_gradient.any()
    first, second, _ = (flat(part) for part in back.contributions)
    assert not first[1][:16].any()
    assert not first[1][64:69].any()
    assert second[2][:16].any()
    assert not second[2][16:].any()


def test_frozen_parameters_and_layers_without_any_are_possible() -> None:
    frozen = nn.Linear(16, 16)
    frozen.weight.requires_grad_(False)
    layers = [lambda: nn.Embedding(32, 16), nn.Identity, frozen, nn.ReLU, lambda: nn.Linear(16, 32)]
    bench = Bench(small_job(layers=layers, parameter_dtype="bfloat16"))
    assert [block.elements for block in bench.layout.blocks] == [1024, 0, 1024, 0, 1024]
    assert same_bits(bench.run((1, 2, 3, 4)), bench.run())
    assert bench.model.layer(Layer(2)).module.weight.dtype == torch.bfloat16


def test_sparse_gradients_are_made_dense() -> None:
    dense = Bench(small_job(layers=[lambda: nn.Embedding(32, 16), lambda: nn.Linear(16, 32)]))
    sparse = Bench(small_job(layers=[lambda: nn.Embedding(32, 16, sparse=True), lambda: nn.Linear(16, 32)]))
    assert torch.allclose(dense.run()[0], sparse.run()[0])


def test_a_layer_that_writes_to_its_input_does_not_change_the_samples() -> None:
    class Vectors(Tokens):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            return torch.full((16,), -1.0 - index), torch.tensor(index % 32)

    job = small_job(
        layers=[lambda: nn.ReLU(inplace=True), lambda: nn.Linear(16, 32)],
        data=Vectors(),
        loss=functional.cross_entropy,
        recompute=True,
    )
    bench = Bench(job)
    assert same_bits(bench.run(), bench.run())
    assert bool((bench.loader.load(Step(0), MicroBatch(0)).input < 0).all())


# ------------------------------------------------------------------ infinite and undefined values


class Spoil(nn.Module):
    """Gives an infinity or NaN when the first input element says so."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, value: Tensor) -> Tensor:
        spoilt = value.clone()
        spoilt[0, 0, 0] = self.value
        return spoilt


class Hide(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return torch.nan_to_num(value, 0.0, 0.0, 0.0)


@pytest.fixture(params=[True, False], ids=["as installed", "without kernels"])
def looks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs are looked at by the compiled kernel where there is one, and by torch."""
    if not request.param:
        monkeypatch.setattr(hops, "KERNELS", None)


@pytest.mark.usefixtures("looks")
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("cuts", [(), (1,), (2,), (3,), (1, 2, 3, 4)])
def test_the_first_layer_with_a_bad_output_is_found_wherever_hops_end(bad: float, cuts: tuple[int, ...]) -> None:
    layers = [lambda: nn.Embedding(32, 16), nn.Identity, lambda: Spoil(bad), Hide, lambda: nn.Linear(16, 32)]
    bench = Bench(small_job(layers=layers))
    edges = [0, *cuts, 5]
    value, upstream = None, None
    for first, last in itertools.pairwise(edges):
        done = bench.runner.forward(hop(first, last, micro_batch=1), value, upstream)
        value, upstream = done.output, done.non_finite
    expected = NonFinite(micro_batch=MicroBatch(1), layer=Layer(2))
    assert upstream == expected
    assert done.loss is not None
    assert done.loss.non_finite == expected
    assert exact_to_float(done.loss.loss) > 0


@pytest.mark.usefixtures("looks")
def test_a_bad_loss_belongs_to_the_last_layer_and_counts_as_zero() -> None:
    bench = Bench(small_job(loss=lambda output, target: output.sum() * float("nan")))
    done = bench.runner.forward(hop(0, 4), None)
    assert done.loss is not None
    assert done.non_finite == done.loss.non_finite == NonFinite(micro_batch=MicroBatch(0), layer=Layer(3))
    assert done.loss.loss == 0


@pytest.mark.usefixtures("looks")
def test_large_finite_values_are_not_taken_for_bad_ones() -> None:
    layers = [lambda: nn.Embedding(32, 16), lambda: Scale(1e38), lambda: Scale(1e-38), lambda: nn.Linear(16, 32)]
    bench = Bench(small_job(layers=layers))
    assert bench.runner.forward(hop(0, 4), None).non_finite is None


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, value: Tensor) -> Tensor:
        return value.sign() * self.factor


# ------------------------------------------------------------------ mistakes


def test_backward_needs_forward_and_drops_what_it_used() -> None:
    bench = Bench(small_job())
    with pytest.raises(InvariantError, match="before it ran forward"):
        bench.runner.backward(hop(0, 4), None)
    bench.runner.forward(hop(0, 4), None)
    bench.runner.backward(hop(0, 4), None)
    with pytest.raises(InvariantError, match="before it ran forward"):
        bench.runner.backward(hop(0, 4), None)


def test_discarded_hops_are_forgotten() -> None:
    bench = Bench(small_job())
    for step in range(3):
        bench.runner.forward(hop(0, 4, step), None)
    bench.runner.discard(hop(0, 4, 0))
    bench.runner.discard(hop(0, 2, 0))
    bench.runner.discard_through(Step(1))
    bench.runner.backward(hop(0, 4, 2), None)
    with pytest.raises(InvariantError):
        bench.runner.backward(hop(0, 4, 1), None)


@pytest.mark.parametrize("gradient", [None, torch.ones(3)])
def test_a_gradient_that_does_not_fit_is_a_bug(gradient: Tensor | None) -> None:
    bench = Bench(small_job())
    bench.runner.forward(hop(0, 2), None)
    with pytest.raises(InvariantError, match="gradient by the output of layer 1"):
        bench.runner.backward(hop(0, 2), gradient)


def test_a_missing_input_or_layer_is_a_bug() -> None:
    bench = Bench(small_job())
    with pytest.raises(InvariantError, match="without an input"):
        bench.runner.forward(hop(1, 2), None)
    bench.model.host([Layer(0)])
    with pytest.raises(InvariantError, match="layer 1 is not hosted"):
        bench.runner.forward(hop(0, 2), None)


class Fails(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        raise ValueError("no such\nluck")


class Pair(nn.Module):
    def forward(self, value: Tensor) -> tuple[Tensor, Tensor]:
        return value, value


class Whole(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return value.long()


class FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        raise ZeroDivisionError("backward")


class BadGradient(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return FailsBackward.apply(value)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Fails, "layer 1 raised ValueError: no such luck"),
        (Pair, "layer 1 gives a tuple: its output must be one tensor"),
        (Whole, "layer 1 gives torch.int64: its output must be a floating-point tensor"),
        (BadGradient, "backward pass of layer 1 raised ZeroDivisionError: backward"),
    ],
)
def test_what_a_layer_does_wrong_is_told_in_one_line(layer: type[nn.Module], message: str) -> None:
    bench = Bench(small_job(layers=[lambda: nn.Embedding(32, 16), layer, lambda: nn.Linear(16, 32)]))
    with pytest.raises(UserCodeError) as caught:
        bench.run()
    assert str(caught.value) == message


def test_a_loss_must_be_one_number() -> None:
    bench = Bench(small_job(loss=lambda output, target: output))
    with pytest.raises(UserCodeError, match=r"loss gives shape \(2, 8, 32\), torch.float32"):
        bench.run()


def test_canonical_leaves_fresh_tensors_alone() -> None:
    for shape in [(), (0,), (3,), (1, 1), (2, 0, 3), (4, 1, 5)]:
        fresh = torch.empty(shape)
        assert canonical(fresh) is fresh
    assert canonical(misaligned(torch.ones(5))).data_ptr() % 64 == 0
