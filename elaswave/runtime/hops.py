"""Runs hops: consecutive layers of one micro-batch, forward and backward.

Every layer works as if it were an autograd graph of its own, cut at its input, whichever hop it is part of: bits do not
depend on where hops begin and end, gradients are contributions of single layers, and tied parameters never mix before
quantisation. Where a cut could not be told from none, the graphs of consecutive layers hang together: one call of the
autograd engine instead of one a layer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward

from elaswave.core.exact import exact_from_float
from elaswave.core.facts import LossScalars, NonFinite
from elaswave.core.ids import Layer, Step
from elaswave.core.keys import backward_key, layer_key
from elaswave.core.protocol.state import HopKey
from elaswave.errors import InvariantError, UserCodeError
from elaswave.job import Job
from elaswave.runtime.contribution import Contribution
from elaswave.runtime.data import MicroBatchData, MicroBatchLoader
from elaswave.runtime.device import Device, canonical, is_canonical
from elaswave.runtime.kernels import KERNELS
from elaswave.runtime.model import PARAMETER_DTYPES, HostedModel
from elaswave.runtime.user_code import UserCode


@dataclass(frozen=True, slots=True, kw_only=True)
class Forwarded:
    """Result of a forward pass.

    output: input of layer `last`, canonical, on the device; None behind the last layer, where `loss` is set instead.
    non_finite: the first layer whose output is not finite, upstream layers included; None where all are finite.
    """

    output: Tensor | None
    loss: LossScalars | None
    non_finite: NonFinite | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerContribution:
    """Gradient of one layer for one micro-batch, by block.

    Valid until the next backward pass of the same layer on this runner. No blocks for a layer without parameters.
    """

    layer: Layer
    blocks: Contribution


@dataclass(frozen=True, slots=True, kw_only=True)
class Backwarded:
    """Result of a backward pass: gradient by the input of layer `first` (None where it is 0), and contributions."""

    input_gradient: Tensor | None
    contributions: tuple[LayerContribution, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Segment:
    """Consecutive layers whose graphs hang together, and what their backward pass needs.

    input: the leaf that the graphs begin with. results: output of each layer, the last layer's is the loss; empty
    where they are made again. key: seeds the generators for the backward pass of the last one.
    """

    first: Layer
    last: Layer
    input: Tensor
    results: tuple[Tensor, ...]
    key: int


class HopRunner:
    """Forward and backward passes on the hosted layers of one worker; for one thread.

    Between forward and backward of a hop it keeps the graphs of its layers, or with Job.recompute their inputs.
    """

    def __init__(self, job: Job, model: HostedModel, loader: MicroBatchLoader, device: Device) -> None:
        self._job = job
        self._model = model
        self._loader = loader
        self._device = device
        self._last_layer = Layer(len(job.layers) - 1)
        self._dtype = PARAMETER_DTYPES[job.parameter_dtype]
        self._kept: dict[HopKey, tuple[_Segment, ...]] = {}
        self._joins = not job.recompute
        self._boundaries_passed = 0  # by the backward pass under way, of a segment

    def forward(self, hop: HopKey, value: Tensor | None, upstream: NonFinite | None = None) -> Forwarded:
        """Run the hop on `value`, the input of layer `first` (None where it is 0: the micro-batch is loaded here).

        `upstream` is what came with the input. A hop that was run before is run again. Raises UserCodeError where the
        data set, a layer or the loss does.
        """
        segments, outputs = self._run_layers(hop, Layer(hop.first), Layer(hop.last), self._first_input(hop, value))
        self._kept[hop] = segments
        non_finite = upstream or _first_non_finite(hop, outputs)
        if hop.last <= self._last_layer:
            return Forwarded(output=outputs[-1], loss=None, non_finite=non_finite)
        return Forwarded(output=None, loss=self._scalars(hop, float(outputs[-1]), non_finite), non_finite=non_finite)

    def backward(self, hop: HopKey, output_gradient: Tensor | None) -> Backwarded:
        """Run the hop backward; `output_gradient` is by the input of layer `last`, None where the hop ends in the loss.

        Raises InvariantError where the forward pass did not run here, or the gradient does not fit its output.
        """
        kept = self._kept.pop(hop, None)
        if kept is None:
            raise InvariantError(f"{hop} runs backward before it ran forward here")
        gradient = None if output_gradient is None else self._device.from_host(output_gradient)
        contributions: list[LayerContribution] = []
        for segment in reversed(kept):
            gradient, found = self._run_backward(hop, segment, gradient)
            contributions[:0] = found
        return Backwarded(input_gradient=gradient, contributions=tuple(contributions))

    def discard(self, hop: HopKey) -> None:
        """Forget what the forward pass of this hop left, if it ran here."""
        self._kept.pop(hop, None)

    def discard_through(self, step: Step) -> None:
        """Forget the hops of this step and of earlier ones."""
        for hop in [hop for hop in self._kept if hop.step <= step]:
            del self._kept[hop]

    def _first_input(self, hop: HopKey, value: Tensor | None) -> Tensor:
        if hop.first > 0:
            if value is None:
                raise InvariantError(f"{hop} runs forward without an input")
            return self._device.from_host(value)
        loaded = self._device.from_host(self._load(hop).input)
        return loaded.to(self._dtype) if loaded.is_floating_point() else loaded

    def _run_layers(
        self, hop: HopKey, first: Layer, last: Layer, value: Tensor
    ) -> tuple[tuple[_Segment, ...], list[Tensor]]:
        """Run layers [first, last) from the first one's input; also the canonical output of each, graphless at cuts."""
        segments: list[_Segment] = []
        outputs: list[Tensor] = []
        layers = range(first, last)
        # Together, before the first layer: between two of them each function costs ten times what it takes in a loop,
        # as what layers compute has displaced it from the processor's caches.
        forward_keys = [layer_key(self._job.seed, hop.step, Layer(layer), hop.micro_batch) for layer in layers]
        backward_keys = [backward_key(self._job.seed, hop.step, Layer(layer), hop.micro_batch) for layer in layers]
        begin, given = first, self._leaf(first, value)
        leaf, results = given, []
        index = int(first)
        # One context for all layers: those of each would cost as much as a small layer.
        with UserCode(lambda: f"layer {index}"), torch.enable_grad():
            for index, forward, backward in zip(layers, forward_keys, backward_keys, strict=True):
                result = self._run(hop, Layer(index), given, forward)
                results.append(result)
                if index + 1 < last and self._may_join(given, result):
                    result.register_hook(partial(self._pass_boundary, backward))  # type: ignore[no-untyped-call]
                    outputs.append(result)
                    given = result
                    continue
                output = canonical(result.detach())
                outputs.append(output)
                kept = () if self._job.recompute else tuple(results)
                segments.append(_Segment(first=begin, last=Layer(index + 1), input=leaf, results=kept, key=backward))
                if index + 1 < last:
                    begin, given = Layer(index + 1), self._leaf(Layer(index + 1), output)
                    leaf, results = given, []
        return tuple(segments), outputs

    def _may_join(self, given: Tensor, result: Tensor) -> bool:
        """Whether the next layer's graph may hang on this result and see what it would see behind a cut."""
        return (
            self._joins
            and is_canonical(result)
            and result.is_floating_point()
            and result.grad_fn is not None
            and result is not given
        )

    def _pass_boundary(self, key: int, gradient: Tensor | None) -> Tensor | None:
        """The backward pass comes to a layer within a segment: what its own engine call would begin with."""
        if gradient is None:
            return None
        self._boundaries_passed += 1
        self._device.seed(key)
        return canonical(gradient)

    def _leaf(self, layer: Layer, value: Tensor) -> Tensor:
        """The input of a segment's graph."""
        if layer == 0:
            return value
        if not value.is_floating_point():
            raise UserCodeError(f"layer {layer - 1} gives {value.dtype}: its output must be a floating-point tensor")
        return value.detach().requires_grad_()

    def _run(self, hop: HopKey, layer: Layer, given: Tensor, key: int) -> Tensor:
        """Output of the layer, for the last one the loss, with its graph; `key` seeds the generators.

        The caller names the layer for what it raises, and enables gradients.
        """
        module = self._model.layer(layer).module
        self._device.seed(key)
        # Autograd forbids writing to a leaf that needs a gradient; samples have to be kept from layer 0 by a copy.
        value = given if given.requires_grad else given.clone()
        version = value._version
        result = module(value)
        if given.requires_grad and value._version != version:
            # Behind a cut autograd itself refuses this.
            raise UserCodeError(f"layer {layer} changes its input in place: that is the output of layer {layer - 1}")
        if not isinstance(result, Tensor):
            raise UserCodeError(f"layer {layer} gives a {type(result).__name__}: its output must be one tensor")
        return self._loss(hop, result) if layer == self._last_layer else result

    def _run_again(self, hop: HopKey, segment: _Segment) -> Tensor:
        """What the forward pass of a segment of one layer did not keep."""
        key = layer_key(self._job.seed, hop.step, segment.first, hop.micro_batch)
        with UserCode(f"layer {segment.first}"), torch.enable_grad():
            return self._run(hop, segment.first, segment.input, key)

    def _loss(self, hop: HopKey, output: Tensor) -> Tensor:
        target = self._device.from_host(self._load(hop).target)
        with UserCode("loss"):
            loss = self._job.loss(output, target)
        if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.is_floating_point()):
            found = f"shape {tuple(loss.shape)}, {loss.dtype}" if isinstance(loss, Tensor) else type(loss).__name__
            raise UserCodeError(f"loss gives {found}: it must give one floating-point number as a tensor")
        return loss

    def _run_backward(
        self, hop: HopKey, segment: _Segment, gradient: Tensor | None
    ) -> tuple[Tensor | None, list[LayerContribution]]:
        """Gradient by the segment's input, None for layer 0, and the contributions of its layers in their order."""
        layers = [self._model.layer(Layer(layer)) for layer in range(segment.first, segment.last)]
        results = segment.results or (self._run_again(hop, segment),)
        self._check_gradient(hop, Layer(segment.last - 1), results[-1], gradient)
        inputs = [segment.input] if segment.input.requires_grad else []
        targets = [*inputs, *(parameter for hosted in layers for parameter in hosted.parameters)]
        found: tuple[Tensor | None, ...] = (None,) * len(targets)
        self._boundaries_passed = 0
        if targets and results[-1].requires_grad:
            self._device.seed(segment.key)
            with UserCode(lambda: f"backward pass of layer {segment.last - 1 - self._boundaries_passed}"):
                found = _gradients(results[-1], targets, gradient)
        if self._boundaries_passed < len(results) - 1:
            return self._run_backward_cut(hop, segment, gradient)
        contributions: list[LayerContribution] = []
        start = len(inputs)
        for layer, hosted in enumerate(layers, segment.first):
            stop = start + len(hosted.parameters)
            blocks = hosted.gradients.gather(found[start:stop])
            contributions.append(LayerContribution(layer=Layer(layer), blocks=blocks))
            start = stop
        return _by_input(inputs, found), contributions

    def _run_backward_cut(
        self, hop: HopKey, segment: _Segment, gradient: Tensor | None
    ) -> tuple[Tensor | None, list[LayerContribution]]:
        """The same with a cut at every layer: some layer's input has no gradient, which counts as zero behind a cut."""
        self._joins = False  # it will be so in each micro-batch
        segments, _ = self._run_layers(hop, segment.first, segment.last, segment.input.detach())
        contributions: list[LayerContribution] = []
        for part in reversed(segments):
            gradient, found = self._run_backward(hop, part, gradient)
            contributions[:0] = found
        return gradient, contributions

    def _check_gradient(self, hop: HopKey, layer: Layer, result: Tensor, gradient: Tensor | None) -> None:
        if layer != self._last_layer and (gradient is None or gradient.shape != result.shape):
            found = "none" if gradient is None else str(tuple(gradient.shape))
            raise InvariantError(
                f"{hop}: gradient by the output of layer {layer} is {found}, not {tuple(result.shape)}"
            )

    def _scalars(self, hop: HopKey, loss: float, non_finite: NonFinite | None) -> LossScalars:
        data = self._load(hop)
        return LossScalars(
            loss=exact_from_float(loss) if math.isfinite(loss) else 0,
            tokens=data.tokens,
            samples=data.samples,
            non_finite=non_finite,
        )

    def _load(self, hop: HopKey) -> MicroBatchData:
        return self._loader.load(hop.step, hop.micro_batch)


def _by_input(inputs: Sequence[Tensor], found: Sequence[Tensor | None]) -> Tensor | None:
    """The first gradient found, canonical, where there is an input that needs one."""
    if not inputs:
        return None
    gradient = found[0]
    return torch.zeros_like(inputs[0]) if gradient is None else canonical(gradient)


def _gradients(result: Tensor, targets: list[Tensor], gradient: Tensor | None) -> tuple[Tensor | None, ...]:
    """torch.autograd.grad with allow_unused, without the check of shapes that imports torch's symbolic algebra.

    That import takes a second in every worker; the shapes have been checked by the caller.
    """
    start = torch.ones_like(result) if gradient is None else gradient
    found: tuple[Tensor | None, ...] = _engine_run_backward(
        (result,), (start,), False, False, tuple(targets), True, accumulate_grad=False
    )
    return found


def _first_non_finite(hop: HopKey, outputs: list[Tensor]) -> NonFinite | None:
    """The first layer of the hop whose output is not finite.

    Every layer is looked at, not only the hop's end: else what is found would depend on where the hops are cut.
    """
    if _all_finite(outputs):
        return None
    for offset, output in enumerate(outputs):
        if not bool(torch.isfinite(output).all()):
            return NonFinite(micro_batch=hop.micro_batch, layer=Layer(hop.first + offset))
    return None


def _all_finite(outputs: list[Tensor]) -> bool:
    """A quick look: True only where every element is finite; large ones may make it False."""
    if KERNELS is not None and all(output.dtype in PARAMETER_DTYPES.values() and output.is_cpu for output in outputs):
        kernel = KERNELS.finite
        return all([kernel(found.data_ptr(), found.numel(), found.dtype is torch.bfloat16) for found in outputs])
    # An infinity or NaN makes the sum one too.
    with torch.no_grad():
        sums = torch.stack([output.sum(dtype=torch.float32) for output in outputs])
    return all(map(math.isfinite, sums.tolist()))
