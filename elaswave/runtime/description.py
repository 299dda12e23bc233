"""What a job's model looks like, found without building factories' layers for real."""

import copy
import functools
import hashlib
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.overrides import TorchFunctionMode

from elaswave.core.events import JobDescription, ParameterDescription
from elaswave.core.ids import Layer
from elaswave.core.keys import init_key
from elaswave.core.parameters import LayerParameters
from elaswave.errors import ConfigError
from elaswave.job import Job
from elaswave.runtime.user_code import UserCode

_ADDRESS: Final = re.compile(r" at 0x[0-9a-f]+")


def build_layer(job: Job, layer: Layer) -> nn.Module:
    """A new instance of one layer on the CPU, with its initial values; the same wherever and whenever it is built."""
    source = job.layers[layer]
    if isinstance(source, nn.Module):
        # Shares nothing with the user's module, whose values stay the initial ones.
        return copy.deepcopy(source)
    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(init_key(job.seed, layer))
    try:
        return _call(layer, source)
    finally:
        torch.default_generator.set_state(before)


def outline_layer(job: Job, layer: Layer) -> nn.Module:
    """The layer, right in all but the values of its tensors; factories are called on the meta device."""
    source = job.layers[layer]
    if isinstance(source, nn.Module):
        return source
    try:
        with torch.device("meta"), _NoInitialisation():
            return _require_module(layer, source())
    except (RuntimeError, NotImplementedError):
        # Meta tensors have no values to read; what is wrong with the factory itself shows when it runs for real.
        return build_layer(job, layer)


class _NoInitialisation(TorchFunctionMode):
    """Skips torch.nn.init: on meta tensors it computes nothing, but torch imports its compiler for that, which takes
    seconds in every worker."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        given = dict(kwargs or {})
        if getattr(func, "__module__", None) == "torch.nn.init":  # methods of built-in types have none
            return args[0] if args else given["tensor"]
        return func(*args, **given)


def describe_parameters(job: Job) -> tuple[LayerParameters, ...]:
    """Trainable parameters of all layers, in the order of named_parameters, with tie groups numbered from 1.

    Factories are called on the meta device, which allocates nothing; one that cannot run there is called for real.
    Raises ConfigError for what cannot be placed: uninitialised or complex parameters, undeclared ties, unknown names.
    """
    return _parameters(job, _outlines(job))


def describe_job(job: Job) -> JobDescription:
    """Description of a job that starts at step 0. Its digest covers everything that decides the bits of a step.

    `steps` is not part of the digest: a longer run passes through the same parameters. Initial values of built modules
    are; those of factories follow from the seed.
    """
    outlines = _outlines(job)
    layers = _parameters(job, outlines)
    return JobDescription(
        layers=layers, steps=job.steps, micro_batches=job.micro_batches, digest=_digest(job, layers, outlines)
    )


def trainable_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters that are trained, by name, in canonical order."""
    return [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]


def _outlines(job: Job) -> list[nn.Module]:
    """One module per layer, right in all but the values of its tensors."""
    return [outline_layer(job, Layer(index)) for index in range(len(job.layers))]


def _call(layer: Layer, factory: Callable[[], nn.Module]) -> nn.Module:
    with UserCode(f"factory of layer {layer}"):
        built = factory()
    return _require_module(layer, built)


def _require_module(layer: Layer, built: object) -> nn.Module:
    if not isinstance(built, nn.Module):
        raise ConfigError(f"factory of layer {layer} gave a {type(built).__name__}: it must give a torch.nn.Module")
    return built


def _parameters(job: Job, outlines: list[nn.Module]) -> tuple[LayerParameters, ...]:
    groups = {place: number for number, group in enumerate(job.tied, start=1) for place in group}
    owners: dict[int, tuple[int, str]] = {}
    layers: list[LayerParameters] = []
    for index, module in enumerate(outlines):
        found: list[ParameterDescription] = []
        for name, parameter in trainable_parameters(module):
            _check_parameter(index, name, parameter)
            other = owners.setdefault(id(parameter), (index, name))
            if other != (index, name):
                raise ConfigError(
                    f"layers {other[0]} and {index} share a parameter ({other[1]!r}, {name!r}): "
                    f"declare it in Job.tied as [({other[0]}, {other[1]!r}), ({index}, {name!r})]"
                )
            group = groups.pop((index, name), 0)
            found.append(ParameterDescription(name=name, shape=tuple(parameter.shape), tie_group=group))
        layers.append(tuple(found))
    for index, name in groups:
        known = ", ".join(parameter.name for parameter in layers[index]) or "none"
        raise ConfigError(f"Job.tied names {name!r} of layer {index}: its trainable parameters are {known}")
    return tuple(layers)


def _check_parameter(layer: int, name: str, parameter: nn.Parameter) -> None:
    if isinstance(parameter, UninitializedParameter):
        raise ConfigError(f"parameter {name!r} of layer {layer} has no shape yet: lazy modules are not possible here")
    if not parameter.is_floating_point():
        raise ConfigError(f"parameter {name!r} of layer {layer} is {parameter.dtype}: must be a floating-point type")


def _digest(job: Job, layers: tuple[LayerParameters, ...], outlines: list[nn.Module]) -> str:
    lines = [
        "elaswave job 1",
        f"{job.optimizer!r} {job.schedule!r} clip={job.clip_norm!r} non_finite={job.non_finite}",
        f"batch={job.global_batch}/{job.micro_batch} seed={job.seed}",
        f"{job.parameter_dtype} {job.accumulation} {job.quantum_exponent}",
        f"data={_qualified_name(type(job.data))} samples={len(job.data)}",
        f"loss={_describe_callable(job.loss)}",
    ]
    for source, module, parameters in zip(job.layers, outlines, layers, strict=True):
        values = _checksum(module) if isinstance(source, nn.Module) else "factory"
        lines.append(f"{_qualified_name(type(module))} {_without_addresses(repr(module))} {parameters!r} {values}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _checksum(module: nn.Module) -> str:
    value = 0
    for tensor in [*module.parameters(), *module.buffers()]:
        value = zlib.crc32(bytes_of(tensor), value)
    return f"{value:08x}"


def bytes_of(tensor: Tensor) -> memoryview:
    """Little-endian bytes of a tensor, row-major; no copy where it is contiguous in host memory."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _describe_callable(value: object) -> str:
    """The same text in every process for the same code."""
    if isinstance(value, functools.partial):
        inner = [_describe_callable(part) for part in (value.func, *value.args)]
        named = [f"{name}={_describe_callable(part)}" for name, part in sorted(value.keywords.items())]
        return f"partial({', '.join(inner + named)})"
    code = getattr(value, "__code__", None)
    if code is not None:
        return f"{_qualified_name(value)} {zlib.crc32(code.co_code):08x}"
    if callable(value) and hasattr(value, "__qualname__"):
        return _qualified_name(value)
    return _without_addresses(repr(value))


def _qualified_name(value: object) -> str:
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"


def _without_addresses(text: str) -> str:
    return _ADDRESS.sub("", text)
