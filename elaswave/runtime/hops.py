"""Runs hops: consecutive layers of one micro-batch, forward and backward, one layer at a time.

Every layer is an autograd graph of its own, cut at its input, whichever hop it is part of: bits do not depend on where
hops begin and end, gradients are contributions of single layers, and tied parameters never mix before quantisation.
"""

import math
from dataclasses import dataclass

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
from elaswave.runtime.device import Device, canonical
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
class _Kept:
    """What a layer's backward pass needs. `result` is the graph's output, None where it is made again."""

    input: Tensor
    result: Tensor | None


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
        self._kept: dict[HopKey, tuple[_Kept, ...]] = {}

    def forward(self, hop: HopKey, value: Tensor | None, upstream: NonFinite | None = None) -> Forwarded:
        """Run the hop on `value`, the input of layer `first` (None where it is 0: the micro-batch is loaded here).

        `upstream` is what came with the input. A hop that was run before is run again. Raises UserCodeError where the
        data set, a layer or the loss does.
        """
        current = self._first_input(hop, value)
        kept: list[_Kept] = []
        outputs: list[Tensor] = []
        for index in range(hop.first, hop.last):
            layer = Layer(index)
            leaf = self._leaf(layer, current)
            result = self._run(hop, layer, leaf)
            kept.append(_Kept(input=leaf, result=None if self._job.recompute else result))
            current = canonical(result.detach())
            outputs.append(current)
        self._kept[hop] = tuple(kept)
        non_finite = upstream or _first_non_finite(hop, outputs)
        if hop.last <= self._last_layer:
            return Forwarded(output=current, loss=None, non_finite=non_finite)
        return Forwarded(output=None, loss=self._scalars(hop, float(current), non_finite), non_finite=non_finite)

    def backward(self, hop: HopKey, output_gradient: Tensor | None) -> Backwarded:
        """Run the hop backward; `output_gradient` is by the input of layer `last`, None where the hop ends in the loss.

        Raises InvariantError where the forward pass did not run here, or the gradient does not fit its output.
        """
        kept = self._kept.pop(hop, None)
        if kept is None:
            raise InvariantError(f"{hop} runs backward before it ran forward here")
        gradient = None if output_gradient is None else self._device.from_host(output_gradient)
        contributions: list[LayerContribution] = []
        for layer in reversed(range(hop.first, hop.last)):
            gradient, contribution = self._run_backward(hop, Layer(layer), kept[layer - hop.first], gradient)
            contributions.append(contribution)
        return Backwarded(input_gradient=gradient, contributions=tuple(reversed(contributions)))

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

    def _leaf(self, layer: Layer, value: Tensor) -> Tensor:
        """The input of a layer's own graph."""
        if layer == 0:
            return value
        if not value.is_floating_point():
            raise UserCodeError(f"layer {layer - 1} gives {value.dtype}: its output must be a floating-point tensor")
        return value.detach().requires_grad_()

    def _run(self, hop: HopKey, layer: Layer, leaf: Tensor) -> Tensor:
        """Output of the layer, for the last one the loss, with its graph."""
        module = self._model.layer(layer).module
        self._device.seed(layer_key(self._job.seed, hop.step, layer, hop.micro_batch))
        # Autograd forbids writing to a leaf that needs a gradient; samples have to be kept from layer 0 by a copy.
        value = leaf if leaf.requires_grad else leaf.clone()
        with UserCode(f"layer {layer}"), torch.enable_grad():
            result = module(value)
        if not isinstance(result, Tensor):
            raise UserCodeError(f"layer {layer} gives a {type(result).__name__}: its output must be one tensor")
        return self._loss(hop, result) if layer == self._last_layer else result

    def _loss(self, hop: HopKey, output: Tensor) -> Tensor:
        target = self._device.from_host(self._load(hop).target)
        with UserCode("loss"), torch.enable_grad():
            loss = self._job.loss(output, target)
        if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.is_floating_point()):
            found = f"shape {tuple(loss.shape)}, {loss.dtype}" if isinstance(loss, Tensor) else type(loss).__name__
            raise UserCodeError(f"loss gives {found}: it must give one floating-point number as a tensor")
        return loss

    def _run_backward(
        self, hop: HopKey, layer: Layer, kept: _Kept, gradient: Tensor | None
    ) -> tuple[Tensor | None, LayerContribution]:
        hosted = self._model.layer(layer)
        result = self._run(hop, layer, kept.input) if kept.result is None else kept.result
        if layer != self._last_layer and (gradient is None or gradient.shape != result.shape):
            found = "none" if gradient is None else str(tuple(gradient.shape))
            raise InvariantError(
                f"{hop}: gradient by the output of layer {layer} is {found}, not {tuple(result.shape)}"
            )
        inputs = [kept.input] if kept.input.requires_grad else []
        targets = [*inputs, *hosted.parameters]
        self._device.seed(backward_key(self._job.seed, hop.step, layer, hop.micro_batch))
        found_gradients: tuple[Tensor | None, ...] = (None,) * len(targets)
        if targets and result.requires_grad:
            with UserCode(f"backward pass of layer {layer}"):
                found_gradients = _gradients(result, targets, gradient)
        contribution = hosted.gradients.gather(found_gradients[len(inputs) :])
        by_input = found_gradients[0] if inputs else None
        if inputs:
            by_input = torch.zeros_like(kept.input) if by_input is None else canonical(by_input)
        return by_input, LayerContribution(layer=layer, blocks=contribution)

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
    # An infinity or NaN makes the sum one too. Large finite values can, so then each output is looked at closely.
    sums = torch.stack([output.sum(dtype=torch.float32) for output in outputs])
    if all(map(math.isfinite, sums.tolist())):
        return None
    for offset, output in enumerate(outputs):
        if not bool(torch.isfinite(output).all()):
            return NonFinite(micro_batch=hop.micro_batch, layer=Layer(hop.first + offset))
    return None
