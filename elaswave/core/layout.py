"""Rectangular layouts: D pipelines of P stages; which layers form a stage."""

from dataclasses import dataclass
from typing import Final

from elaswave.core.axes import LAYOUT_AXES, Axes
from elaswave.core.ids import Layer
from elaswave.errors import ConfigError

MAX_TP: Final = 1
"""Workers of one stage replica in this version: layers are not divided over several."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Degrees of parallelism asked for: data x pipeline x tensor."""

    dp: int
    pp: int
    tp: int = 1

    def __post_init__(self) -> None:
        for name, degree in (("--dp", self.dp), ("--pp", self.pp), ("--tp", self.tp)):
            if degree < 1:
                raise ConfigError(f"{name} is {degree}: a degree of parallelism is at least 1")
        if self.tp > MAX_TP:
            raise ConfigError(f"--tp is {self.tp}: tensor parallelism is not supported, the limit is {MAX_TP}")

    @property
    def axes(self) -> Axes:
        """Where its workers are."""
        return Axes(names=LAYOUT_AXES, sizes=(self.dp, self.pp, self.tp))

    @property
    def workers(self) -> int:
        """Workers that the layout fills."""
        return self.dp * self.pp * self.tp


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Layers `first` to `last` (exclusive)."""

    first: Layer
    last: Layer

    @property
    def layers(self) -> tuple[Layer, ...]:
        return tuple(Layer(layer) for layer in range(self.first, self.last))


def partition_layers(layers: int, stages: int) -> tuple[Stage, ...]:
    """Cut `layers` into contiguous stages whose sizes differ by one at most, larger ones first.

    Raises ConfigError where there are more stages than layers.
    """
    if stages > layers:
        raise ConfigError(f"--pp is {stages} but the model has {layers} layers: a stage needs at least one layer")
    small, larger = divmod(layers, stages)
    found: list[Stage] = []
    first = 0
    for index in range(stages):
        last = first + small + (1 if index < larger else 0)
        found.append(Stage(first=Layer(first), last=Layer(last)))
        first = last
    return tuple(found)


def check_batch(*, micro_batches: int, layout: Layout) -> None:
    """Every pipeline needs a micro-batch. Raises ConfigError."""
    if micro_batches < layout.dp:
        raise ConfigError(
            f"the global batch has {micro_batches} micro-batches for --dp {layout.dp}: "
            "every pipeline needs at least one"
        )
