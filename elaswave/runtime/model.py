"""Parameters and modules of the layers that a worker hosts, and initial values of blocks."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from elaswave.core.ids import BlockId, Layer
from elaswave.core.parameters import BlockLayout, Placement
from elaswave.core.shape import Shard
from elaswave.errors import InvariantError
from elaswave.job import Job
from elaswave.runtime.contribution import GradientGatherer
from elaswave.runtime.description import build_layer, trainable_parameters
from elaswave.runtime.device import Device

PARAMETER_DTYPES: Final[Mapping[str, torch.dtype]] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Parameter types by their names in Job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostedLayer:
    """One layer that can run here.

    parameters: trainable ones in canonical order; each is a view of its block, so layers that share a tied block keep
    parameters, and hence gradients, of their own. gradients: brings those of a backward pass into the order of blocks.
    """

    module: nn.Module
    parameters: tuple[nn.Parameter, ...]
    gradients: GradientGatherer


class HostedModel:
    """The hosted layers of one worker: their modules, whose parameters are views of flat blocks."""

    def __init__(self, job: Job, layout: BlockLayout, device: Device) -> None:
        self._job = job
        self._layout = layout
        self._device = device
        self._dtype = PARAMETER_DTYPES[job.parameter_dtype]
        self._places = _places_by_layer(layout)
        self._blocks: dict[BlockId, Tensor] = {}
        self._layers: dict[Layer, HostedLayer] = {}

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Hosted layers, ascending."""
        return tuple(sorted(self._layers))

    @property
    def dtype(self) -> torch.dtype:
        """Type of parameters, contributions and activations."""
        return self._dtype

    def host(self, layers: Iterable[Layer]) -> None:
        """Host exactly these layers: build what is missing, with initial values, and free what is not named.

        A tied block that was here already keeps its values; a new one starts from the initial values of the layer
        that is built, and is right only once parameters have been installed or where that layer is the group's first.
        """
        wanted = frozenset(layers)
        for layer in [layer for layer in self._layers if layer not in wanted]:
            del self._layers[layer]
        for layer in sorted(wanted - self._layers.keys()):
            self._layers[layer] = self._build(layer)
        needed = {place.block for layer in wanted for place in self._places.get(layer, {}).values()}
        for block in [block for block in self._blocks if block not in needed]:
            del self._blocks[block]

    def layer(self, layer: Layer) -> HostedLayer:
        """A hosted layer. Raises InvariantError for another one."""
        found = self._layers.get(layer)
        if found is None:
            raise InvariantError(f"layer {layer} is not hosted here; hosted: {list(self.layers)}")
        return found

    def block(self, block: BlockId) -> Tensor:
        """Flat parameters of a block of a hosted layer, in parameter dtype; empty for a block without elements."""
        found = self._blocks.get(block)
        if found is None:
            raise InvariantError(f"block {block} is not hosted here; hosted: {sorted(self._blocks)}")
        return found

    def hosts_block(self, block: BlockId) -> bool:
        """Whether a hosted layer has parameters in this block."""
        return block in self._blocks

    def install(self, shard: Shard, parameters: Tensor) -> None:
        """Overwrite the parameters of `shard`; `parameters` has its elements, on any device, in parameter dtype."""
        if parameters.numel() != shard.elements or parameters.dtype != self._dtype:
            raise InvariantError(
                f"parameters of {shard} have {parameters.numel()} elements of {parameters.dtype}: "
                f"must be {shard.elements} of {self._dtype}"
            )
        if shard.elements:
            self.block(shard.block)[shard.start : shard.stop].copy_(parameters)

    def _build(self, layer: Layer) -> HostedLayer:
        module = build_layer(self._job, layer).train()
        places = self._places.get(layer, {})
        parameters = trainable_parameters(module)
        for name, parameter in parameters:
            self._place(parameter, places[name])
        # Frozen parameters and buffers get the type and device that the trainable ones have by now.
        module.to(device=self._device.torch_device, dtype=self._dtype)
        return HostedLayer(
            module=module,
            parameters=tuple(parameter for _, parameter in parameters),
            gradients=GradientGatherer(
                self._layout, [places[name] for name, _ in parameters], self._dtype, self._device.torch_device
            ),
        )

    def _place(self, parameter: nn.Parameter, place: Placement) -> None:
        """Make the parameter a view of its block; its value goes there where the block is new."""
        tied = len(self._layout.blocks[place.block].layers) > 1
        is_new = place.block not in self._blocks
        if is_new:
            elements = self._layout.blocks[place.block].elements
            self._blocks[place.block] = torch.zeros(elements, dtype=self._dtype, device=self._device.torch_device)
        view = view_of(self._blocks[place.block], place)
        if is_new or not tied:
            view.copy_(parameter.data)
        parameter.data = view


def view_of(block: Tensor, place: Placement) -> Tensor:
    """The part of a flat block where a parameter lies, in the parameter's shape."""
    return block[place.offset : place.stop].view(place.shape)


def initial_blocks(job: Job, layout: BlockLayout, wanted: Iterable[BlockId]) -> Iterator[tuple[BlockId, Tensor]]:
    """Initial float32 values of blocks, ascending by the layer that gives them; each layer is built once.

    A tied block gets the values of its group's first layer.
    """
    by_layer: dict[Layer, list[BlockId]] = {}
    for block in wanted:
        by_layer.setdefault(layout.blocks[block].layers[0], []).append(block)
    for layer, blocks in sorted(by_layer.items()):
        values = {block: torch.zeros(layout.blocks[block].elements) for block in blocks}
        if any(layout.blocks[block].elements for block in blocks):
            places = layout.of_layer(layer)
            for name, parameter in trainable_parameters(build_layer(job, layer)):
                if places[name].block in values:
                    view_of(values[places[name].block], places[name]).copy_(parameter.data)
        yield from values.items()


def _places_by_layer(layout: BlockLayout) -> dict[Layer, dict[str, Placement]]:
    found: dict[Layer, dict[str, Placement]] = {}
    for (layer, name), place in layout.placements.items():
        found.setdefault(layer, {})[name] = place
    return found
