"""What the worker's protocol asks its shell to do, in order. Payloads are opaque: the protocol only passes them on."""

from dataclasses import dataclass

from elaswave.core.facts import Decision, Fact, Partial
from elaswave.core.ids import Coverage, Epoch, Layer, MicroBatch, ShardId, Step, WorkerId

Payload = object
"""Something of the shell's: a tensor or a received buffer; in the model, a symbolic value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Send:
    """Send a fact, also to this worker itself (then the shell hands it straight back).

    `payload` is set for activations, gradients and reduced shards. For Partial, Parameters and State the shell takes
    the bytes from the accumulator (step, layer, epoch) or from its copy of the shard, as they are now.
    """

    to: WorkerId
    fact: Fact
    payload: Payload = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Combine:
    """Add the partial sums `parts` (disjoint, complete) and tell the protocol by `combined`."""

    step: Step
    shard: ShardId
    parts: tuple[Payload, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PassOn:
    """Add this worker's accumulators of the layer to the running sum that came, and send the sum with `fact`.

    `accumulators` are their assignment epochs, one or more. `before` is what the running sum that came covers, 0 where
    there is none; then `payload` is not used. All are disjoint and make up the coverage of `fact`.
    """

    to: WorkerId
    fact: Partial
    accumulators: tuple[Epoch, ...]
    before: Coverage
    payload: Payload = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Apply:
    """Update the local copy of `shard` from `version` to version + 1 with the reduced gradient."""

    shard: ShardId
    version: int
    reduced: Payload
    decision: Decision


@dataclass(frozen=True, slots=True, kw_only=True)
class InstallParameters:
    """Overwrite the hosted parameters of `shard` with received ones."""

    shard: ShardId
    version: int
    payload: Payload


@dataclass(frozen=True, slots=True, kw_only=True)
class InstallOwnParameters:
    """Overwrite the hosted parameters of `shard` from the local copy."""

    shard: ShardId
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class InstallState:
    """Take a received optimizer state as the local copy of `shard`."""

    shard: ShardId
    version: int
    payload: Payload


@dataclass(frozen=True, slots=True, kw_only=True)
class DropCopy:
    """Forget the local copy of `shard`."""

    shard: ShardId


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLayers:
    """From now on exactly these layers are hosted here; build what is missing, free what is not named."""

    layers: tuple[Layer, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscardHop:
    """Forget what a forward pass left for its backward pass: the hop is no longer run here."""

    step: Step
    micro_batch: MicroBatch
    first: Layer
    last: Layer


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDecided:
    """A step is decided: free everything of it and of earlier steps. Emitted before the updates of the step."""

    decision: Decision


Effect = (
    Send | Combine | PassOn | Apply | InstallParameters | InstallOwnParameters | InstallState | DropCopy | HostLayers
    | DiscardHop | StepDecided
)  # fmt: skip
