"""The numeric fingerprint: do two workers compute the same bits?"""

import hashlib

import torch
from torch import Tensor

from elaswave.core.ids import Layer, MicroBatch, Step
from elaswave.core.parameters import BlockLayout
from elaswave.core.protocol.state import HopKey
from elaswave.errors import ConfigError
from elaswave.job import Job
from elaswave.runtime.accumulation import Accumulation, accumulation_of
from elaswave.runtime.contribution import whole
from elaswave.runtime.data import MicroBatchLoader
from elaswave.runtime.description import bytes_of, outline_layer
from elaswave.runtime.device import Device
from elaswave.runtime.hops import HopRunner, LayerContribution
from elaswave.runtime.model import HostedModel
from elaswave.runtime.optimizer import Update, Updater
from elaswave.runtime.reduction import sum_of_squares
from elaswave.runtime.shards import initial_state

_OUTPUT_SCALE = 2.0**-10
_UPDATED_ELEMENTS = 1 << 16
"""All elements of an update take the same code path; the start of each block is enough to tell."""


def fingerprint(job: Job, layout: BlockLayout, device: Device) -> str:
    """sha256 (hex) over one reference micro-batch through each layer type: forward, backward, accumulation, update.

    Layers are of one type where class, configuration (as printed) and parameters agree; layers of a type seen before
    are not run, and what follows gets the output of the first. The micro-batch is the first one of the job, so
    workers that read different data are told apart too. Also covers the versions and settings that choose kernels.

    Raises ConfigError where a layer changes its buffers: their values would depend on what ran where.
    """
    probe = _Probe(job, layout, device)
    seen: dict[str, Tensor | None] = {}
    value: Tensor | None = None
    for index in range(len(job.layers)):
        kind = probe.kind_of(Layer(index), value)
        if kind not in seen:
            seen[kind] = probe.run(Layer(index), value)
        value = seen[kind]
    return probe.digest.hexdigest()


class _Probe:
    def __init__(self, job: Job, layout: BlockLayout, device: Device) -> None:
        self._job = job
        self._layout = layout
        self._model = HostedModel(job, layout, device)
        self._runner = HopRunner(job, self._model, MicroBatchLoader(job), device)
        self._accumulation: Accumulation = accumulation_of(job)
        self._updater = Updater(job.optimizer)
        self.digest = hashlib.sha256(
            f"{torch.__version__} {torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()} threads "
            f"{device.torch_device.type} {job.parameter_dtype} {job.accumulation}\n".encode()
        )

    def kind_of(self, layer: Layer, value: Tensor | None) -> str:
        """Text that is the same for layers that compute alike on inputs of the same shape."""
        module = outline_layer(self._job, layer)
        shapes = [(name, tuple(found.shape)) for name, found in module.named_parameters()]
        given = None if value is None else (tuple(value.shape), value.dtype)
        # The last layer is run with the loss.
        is_last = layer == len(self._job.layers) - 1
        return f"{type(module).__module__}.{type(module).__qualname__} {module!r} {shapes} {given} {is_last}"

    def run(self, layer: Layer, value: Tensor | None) -> Tensor | None:
        """Run a layer and its update, add all results to the digest, and give its output."""
        self._model.host([layer])
        module = self._model.layer(layer).module
        before = {name: buffer.clone() for name, buffer in module.named_buffers()}
        hop = HopKey(step=Step(0), micro_batch=MicroBatch(0), first=layer, last=Layer(layer + 1))
        done = self._runner.forward(hop, value)
        if done.output is not None:
            self._add(done.output)
            back = self._runner.backward(hop, done.output * _OUTPUT_SCALE)
        else:
            self.digest.update(repr(done.loss).encode())
            back = self._runner.backward(hop, None)
        self._check_buffers(layer, before)
        if back.input_gradient is not None:
            self._add(back.input_gradient)
        self._update(back.contributions[0])
        return done.output

    def _update(self, contribution: LayerContribution) -> None:
        for block, by_block in contribution.blocks.items():
            found = by_block.flat()
            self._add(found)
            given = found[:_UPDATED_ELEMENTS].to("cpu")
            total = self._accumulation.empty(given.numel())
            for first in (True, False):
                self._accumulation.enter(total, whole(given), first=first)
            gradient = self._accumulation.to_gradient([total], self._job.micro_batches)
            self.digest.update(repr(sum_of_squares(gradient)).encode())
            values = self._model.block(block)[:_UPDATED_ELEMENTS].to("cpu", torch.float32)
            state = initial_state(self._job.optimizer, values)
            update = Update(step=Step(0), learning_rate=self._job.optimizer.lr, gradient_scale=0.75)
            self._updater.apply(state, gradient, update)
            self.digest.update(bytes_of(state.serialised()))

    def _add(self, tensor: Tensor) -> None:
        self.digest.update(bytes_of(tensor))

    def _check_buffers(self, layer: Layer, before: dict[str, Tensor]) -> None:
        for name, buffer in self._model.layer(layer).module.named_buffers():
            if name not in before or bytes_of(before[name]) != bytes_of(buffer):
                raise ConfigError(
                    f"layer {layer} changes its buffer {name!r} in forward: its value would depend on which worker ran "
                    f"which micro-batch; use a layer without running statistics"
                )
