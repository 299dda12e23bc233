"""What the user asks for: the Job and its parts. Values only; importing this needs no torch."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, Protocol, TypeAlias

from elaswave.core.events import StepResult
from elaswave.core.ids import Step
from elaswave.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from elaswave.runtime.evaluation import Evaluation

DTYPES: Final = ("float32", "bfloat16")
ACCUMULATIONS: Final = ("exact64", "float32")
NON_FINITE_POLICIES: Final = ("raise", "skip-step")
QUANTUM_EXPONENTS: Final = range(-80, 1)
"""Between them the squares of values near the limit of a contribution are ordinary float32 numbers."""

MAX_MICRO_BATCHES: Final = 2**20
"""With more of them the exact range of one contribution, 2^(53 + e) / M, would fall below 2^(33 + e)."""

_MIN_EPS: Final = 1e-30
"""Must not vanish in float32: padding has zero moments, and zero divided by zero is not a number."""

_MAX_SEED: Final = 2**63 - 1

LayerSource: TypeAlias = "nn.Module | Callable[[], nn.Module]"
"""A built layer, or a factory that is called only where the layer is hosted."""

Loss: TypeAlias = "Callable[[Tensor, Tensor], Tensor]"
"""(output of the last layer, target) -> mean loss of the micro-batch, a scalar tensor."""

StateValue: TypeAlias = "bool | int | float | str | list[StateValue] | dict[str, StateValue] | Tensor | None"

TieGroup: TypeAlias = Sequence[tuple[int, str]]
"""(layer, parameter name) of each place that shares one parameter; the first place gives its initial value."""


class Dataset(Protocol):
    """Samples by index. An item must depend on its index only, and on random numbers drawn while it is made."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> "tuple[Tensor, Tensor]":
        """(input, target) of one sample; all samples have the same shapes and types."""


class UserState(Protocol):
    """State of the user's own that must survive failures: plain values and tensors by name."""

    def state_dict(self) -> "Mapping[str, StateValue]": ...

    def load_state_dict(self, state: "Mapping[str, StateValue]", /) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamW:
    """Adam with decoupled weight decay, as torch.optim.AdamW. `lr` is multiplied by the schedule's factor."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        _check_positive("AdamW.lr", self.lr)
        if not _MIN_EPS <= self.eps < math.inf:
            raise ConfigError(f"AdamW.eps is {self.eps!r}: must be a finite number from {_MIN_EPS} on")
        _check_not_negative("AdamW.weight_decay", self.weight_decay)
        for beta in self.betas:
            _check_fraction("AdamW.betas", beta)


@dataclass(frozen=True, slots=True, kw_only=True)
class SGD:
    """Stochastic gradient descent with momentum and L2 penalty, as torch.optim.SGD."""

    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check_positive("SGD.lr", self.lr)
        _check_fraction("SGD.momentum", self.momentum)
        _check_not_negative("SGD.weight_decay", self.weight_decay)


Optimizer: TypeAlias = AdamW | SGD


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    """The learning rate of the optimizer, at every step."""

    def factor(self, step: Step) -> float:
        """1, whatever the step."""
        del step
        return 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmupCosine:
    """Rises linearly over `warmup_steps`, then falls along a half cosine to `final_factor` at `total_steps`."""

    total_steps: int
    warmup_steps: int = 0
    final_factor: float = 0.1

    def __post_init__(self) -> None:
        _check_warmup("WarmupCosine", self.warmup_steps, self.total_steps, self.final_factor)

    def factor(self, step: Step) -> float:
        """What the learning rate of step `step` (from 0) is multiplied by."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        height = (1 + math.cos(math.pi * _part_done(step, self.warmup_steps, self.total_steps))) / 2
        return self.final_factor + (1 - self.final_factor) * height


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmupLinear:
    """Rises linearly over `warmup_steps`, then falls along a line to `final_factor` at `total_steps`."""

    total_steps: int
    warmup_steps: int = 0
    final_factor: float = 0.0

    def __post_init__(self) -> None:
        _check_warmup("WarmupLinear", self.warmup_steps, self.total_steps, self.final_factor)

    def factor(self, step: Step) -> float:
        """What the learning rate of step `step` (from 0) is multiplied by."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return 1 - (1 - self.final_factor) * _part_done(step, self.warmup_steps, self.total_steps)


Schedule: TypeAlias = Constant | WarmupCosine | WarmupLinear


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One training run. Checked when it is made: raises ConfigError, one line, for what cannot be.

    What decides the bits is (layers, loss, data, optimizer, schedule, global_batch, micro_batch, seed, clip_norm, tied,
    parameter_dtype, accumulation, quantum_exponent, non_finite); layout, failures and `recompute` do not.
    """

    layers: Sequence[LayerSource]
    """The model, in order. Each layer takes one tensor, the output of the one before, and gives one floating-point
    tensor; fixed shapes. The first gets the input of a sample batch. A layer must be a function of its input, its
    parameters and torch's random numbers: buffers that change in forward would depend on the layout. Built modules are
    copied, never changed, and must have the same values in every process (call torch.manual_seed before you build
    them); factories are seeded by ElasWave and save memory, as only hosted layers are built."""

    loss: Loss
    """Mean loss of a micro-batch from the last layer's output and the target."""

    data: Dataset
    """Map-style data set."""

    optimizer: Optimizer

    global_batch: int
    """Samples per step. Never changes, whatever happens to workers."""

    micro_batch: int = 1
    """Samples that go through a layer together; must divide global_batch."""

    steps: int = 0
    """Training steps; 0: one pass over the data."""

    schedule: Schedule = Constant()
    """Factor on the learning rate, by step."""

    seed: int = 0
    """Decides initial values of factories, order of samples and all random numbers; 0 to 2^63 - 1."""

    clip_norm: float | None = None
    """Gradients are scaled down to this global 2-norm; None: not at all."""

    tied: Sequence[TieGroup] = ()
    """Groups of places that share one parameter."""

    recompute: bool = False
    """Keep only the input of each layer and run its forward pass again in backward: less memory, same bits."""

    parameter_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of parameters and activations; master values and moments are float32 in any case."""

    device: str = "cpu"
    """cpu, cuda (each worker takes the device of its local rank) or cuda:INDEX; the same kind on all workers."""

    accumulation: Literal["exact64", "float32"] = "exact64"
    """exact64: gradients are summed without rounding errors, so bits do not depend on the layout. float32: they do."""

    quantum_exponent: int = -44
    """exact64 rounds contributions to multiples of 2^quantum_exponent (docs/numerics.md says when to change it)."""

    non_finite: Literal["raise", "skip-step"] = "raise"
    """What to do at an infinite or undefined loss or gradient: end the job, or leave the parameters as they are."""

    on_step: Callable[[StepResult], str | None] | None = None
    """Called after every step on one worker; a returned text is shown to the operator."""

    evaluate: "Callable[[Evaluation], str | None] | None" = None
    """Called with the whole model after every evaluate_every-th step on one worker; a returned text is shown."""

    evaluate_every: int = 0
    """Steps between evaluations; above 0 exactly where `evaluate` is given."""

    state: UserState | None = None
    """State of the user's own that on_step and evaluate change; survives the loss of the worker that calls them."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "tied", tuple(tuple((layer, name) for layer, name in group) for group in self.tied))
        _check_batches(self)
        _check_choices(self)
        _check_callbacks(self)
        _check_tied(self)
        if self.steps == 0:
            object.__setattr__(self, "steps", len(self.data) // self.global_batch)

    @property
    def micro_batches(self) -> int:
        """Micro-batches per step (M)."""
        return self.global_batch // self.micro_batch

    def learning_rate(self, step: Step) -> float:
        """Learning rate of step `step`."""
        return self.optimizer.lr * self.schedule.factor(step)


def _check_batches(job: Job) -> None:
    if not job.layers:
        raise ConfigError("Job.layers is empty: give at least one layer")
    for name, value in (("global_batch", job.global_batch), ("micro_batch", job.micro_batch)):
        if value < 1:
            raise ConfigError(f"Job.{name} is {value}: must be at least 1")
    if job.global_batch % job.micro_batch:
        raise ConfigError(
            f"Job.global_batch {job.global_batch} is not divisible by micro_batch {job.micro_batch}: "
            f"give a multiple, such as {-(-job.global_batch // job.micro_batch) * job.micro_batch}"
        )
    if job.micro_batches > MAX_MICRO_BATCHES:
        raise ConfigError(
            f"Job.global_batch {job.global_batch} with micro_batch {job.micro_batch} makes {job.micro_batches} "
            f"micro-batches: at most {MAX_MICRO_BATCHES} are possible, give a larger micro_batch"
        )
    if len(job.data) < job.global_batch:
        raise ConfigError(
            f"Job.data has {len(job.data)} samples, fewer than global_batch {job.global_batch}: "
            f"give more data or a smaller global_batch"
        )
    if job.steps < 0:
        raise ConfigError(f"Job.steps is {job.steps}: must be at least 1, or 0 for one pass over the data")


def _check_choices(job: Job) -> None:
    if not 0 <= job.seed <= _MAX_SEED:
        raise ConfigError(f"Job.seed is {job.seed}: must be from 0 to {_MAX_SEED}")
    if job.clip_norm is not None:
        _check_positive("Job.clip_norm", job.clip_norm)
    _check_choice("parameter_dtype", job.parameter_dtype, DTYPES)
    _check_choice("accumulation", job.accumulation, ACCUMULATIONS)
    _check_choice("non_finite", job.non_finite, NON_FINITE_POLICIES)
    if job.quantum_exponent not in QUANTUM_EXPONENTS:
        raise ConfigError(
            f"Job.quantum_exponent is {job.quantum_exponent}: "
            f"must be from {QUANTUM_EXPONENTS[0]} to {QUANTUM_EXPONENTS[-1]}"
        )
    if not isinstance(job.optimizer, AdamW | SGD):
        raise ConfigError(f"Job.optimizer is a {type(job.optimizer).__name__}: give elaswave.AdamW or elaswave.SGD")
    if not isinstance(job.schedule, Constant | WarmupCosine | WarmupLinear):
        raise ConfigError(
            f"Job.schedule is a {type(job.schedule).__name__}: give elaswave.Constant, WarmupCosine or WarmupLinear"
        )


def _check_callbacks(job: Job) -> None:
    if job.evaluate_every < 0:
        raise ConfigError(f"Job.evaluate_every is {job.evaluate_every}: must be at least 1 where evaluate is given")
    if (job.evaluate is None) != (job.evaluate_every == 0):
        raise ConfigError(
            f"Job.evaluate is {'not ' if job.evaluate is None else ''}given and evaluate_every is "
            f"{job.evaluate_every}: give both or neither"
        )


def _check_tied(job: Job) -> None:
    seen: set[tuple[int, str]] = set()
    for group in job.tied:
        for layer, name in group:
            if not 0 <= layer < len(job.layers):
                raise ConfigError(f"Job.tied names layer {layer}: layers are 0 to {len(job.layers) - 1}")
            if (layer, name) in seen:
                raise ConfigError(f"Job.tied names parameter {name!r} of layer {layer} twice: it can be tied once")
            seen.add((layer, name))


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"Job.{name} is {value!r}: must be one of {', '.join(choices)}")


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{name} is {value!r}: must be a finite number above 0")


def _check_not_negative(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"{name} is {value!r}: must be a finite number from 0 on")


def _check_fraction(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ConfigError(f"{name} has {value!r}: must be from 0 to below 1")


def _check_warmup(name: str, warmup_steps: int, total_steps: int, final_factor: float) -> None:
    if not 0 <= warmup_steps < total_steps:
        raise ConfigError(
            f"{name}.warmup_steps is {warmup_steps} and total_steps {total_steps}: "
            f"warmup_steps must be from 0 to below total_steps"
        )
    _check_not_negative(f"{name}.final_factor", final_factor)


def _part_done(step: int, warmup_steps: int, total_steps: int) -> float:
    return min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
