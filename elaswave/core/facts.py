"""Facts: what workers tell each other. Each has one possible value, whoever makes it (design, law L2).

Only the keys and small scalars are here; tensors travel beside a fact as its payload, kept by the shell.
"""

from dataclasses import dataclass

from elaswave.core.exact import Exact
from elaswave.core.ids import Coverage, Epoch, Layer, MicroBatch, ShardId, Step


@dataclass(frozen=True, slots=True, kw_only=True)
class NonFinite:
    """Where an infinity or NaN first showed up in a step."""

    micro_batch: MicroBatch
    layer: Layer


@dataclass(frozen=True, slots=True, kw_only=True)
class LossScalars:
    """Sums over the micro-batches of a coverage; they ride on the loss shard.

    loss: sum of the micro-batches' mean losses. tokens: sum of their target counts. samples: sum, modulo 2^64, of a
    hash of (step, micro-batch, sample ids).
    """

    loss: Exact = 0
    tokens: int = 0
    samples: int = 0
    non_finite: NonFinite | None = None

    def __add__(self, other: "LossScalars") -> "LossScalars":
        return LossScalars(
            loss=self.loss + other.loss,
            tokens=self.tokens + other.tokens,
            samples=(self.samples + other.samples) % 2**64,
            non_finite=first_non_finite(self.non_finite, other.non_finite),
        )


def first_non_finite(one: NonFinite | None, other: NonFinite | None) -> NonFinite | None:
    """The one with the smaller (micro-batch, layer); independent of the order of arguments."""
    if one is None or other is None:
        return one or other
    return min(one, other, key=lambda found: (found.micro_batch, found.layer))


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardScalars:
    """What a reduced shard adds to the step's result.

    norm_squared: exact sum of squares of the reduced gradient, before scaling and clipping; 0 where not finite.
    """

    norm_squared: Exact = 0
    finite: bool = True
    loss: LossScalars | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Result of a decided step: a function of facts only, so it may be found twice and is the same (rule 4.5)."""

    step: Step
    norm_squared: Exact
    finite: bool
    loss: LossScalars


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """Input of layer `cut`, 1 <= cut < L; payload: the tensor. `non_finite` tells where it went wrong upstream."""

    step: Step
    micro_batch: MicroBatch
    cut: Layer
    non_finite: NonFinite | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradient:
    """Gradient of the loss by the input of layer `cut`; payload: the tensor."""

    step: Step
    micro_batch: MicroBatch
    cut: Layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Partial:
    """Sum of the contributions of one layer to one shard over `coverage`; payload: the slice of the accumulator.

    `epoch` is the assignment epoch of the accumulator; of a `running` sum, which was combined on the way from the
    accumulators of several workers, the epoch of the reduce plan (rule 3.11). `loss` is set for the loss shard only.
    """

    step: Step
    shard: ShardId
    layer: Layer
    epoch: Epoch
    coverage: Coverage
    loss: LossScalars | None = None
    running: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduced:
    """Complete gradient of one shard; payload: float32 elements."""

    step: Step
    shard: ShardId
    scalars: ShardScalars


@dataclass(frozen=True, slots=True, kw_only=True)
class Have:
    """The sender holds version `step` and the reduced gradient of `step` for these shards (rule 4.3)."""

    step: Step
    entries: tuple[tuple[ShardId, ShardScalars], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """The step is decided, with this result."""

    decision: Decision


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Published parameters of one shard at `version`; payload: elements in the model's parameter dtype.

    `decision` is the result of step version - 1, None at version 0: whoever holds it holds the decision.
    """

    shard: ShardId
    version: int
    decision: Decision | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ParametersRequest:
    """Asks the owner for the parameters of a shard that the sender hosts and lacks."""

    shard: ShardId


@dataclass(frozen=True, slots=True, kw_only=True)
class StateRequest:
    """Asks the owner for the optimizer state of a shard; `step` is the asking worker's step."""

    shard: ShardId
    step: Step


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Optimizer state of one shard at `version`; payload: master values and moments."""

    shard: ShardId
    version: int
    decision: Decision | None


Fact = (
    Activation | Gradient | Partial | Reduced | Have | Decided | Parameters | ParametersRequest | StateRequest | State
)  # fmt: skip
