"""The whole model with the parameters of one version, for the user's evaluation."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from elaswave.core.ids import Layer, Step
from elaswave.core.keys import evaluation_key
from elaswave.job import Job
from elaswave.runtime.device import Device
from elaswave.runtime.model import PARAMETER_DTYPES, HostedModel
from elaswave.runtime.user_code import UserCode


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What Job.evaluate gets after step `step`: layers in order, with the new parameters, in eval mode."""

    step: Step
    layers: tuple[nn.Module, ...]
    forward: Callable[[Tensor], Tensor]
    """Output of the last layer for a batch of inputs; no gradients. The output is on the layers' device."""


def evaluate(job: Job, model: HostedModel, device: Device, step: Step) -> str | None:
    """Call Job.evaluate with a model that hosts every layer; its text, if any. Raises UserCodeError where it fails.

    Generators are seeded from the step, and the layers are in training mode again afterwards.
    """
    if job.evaluate is None:
        return None
    layers = tuple(model.layer(Layer(index)).module for index in range(len(job.layers)))
    dtype = PARAMETER_DTYPES[job.parameter_dtype]

    def forward(value: Tensor) -> Tensor:
        current = device.from_host(value)
        if current.is_floating_point():
            current = current.to(dtype)
        for layer in layers:
            current = layer(current)
        return current

    device.seed(evaluation_key(job.seed, step))
    for layer in layers:
        layer.eval()
    try:
        with UserCode("evaluate"), torch.no_grad():
            return job.evaluate(Evaluation(step=step, layers=layers, forward=forward))
    finally:
        for layer in layers:
            layer.train()
