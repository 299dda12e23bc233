"""Training in one process, from the same pieces as the workers and without any network: the oracle of all tests."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from elaswave.core.events import StepResult
from elaswave.core.exact import exact_to_float
from elaswave.core.facts import Decision, LossScalars, ShardScalars
from elaswave.core.ids import BlockId, Layer, MicroBatch, ShardId, Step
from elaswave.core.parameters import block_layout
from elaswave.core.protocol.state import HopKey
from elaswave.core.shape import ModelShape, divide_into_shards
from elaswave.errors import ConfigError, InvariantError
from elaswave.job import Job
from elaswave.runtime.accumulation import accumulation_of
from elaswave.runtime.data import MicroBatchLoader
from elaswave.runtime.description import describe_parameters
from elaswave.runtime.device import CpuDevice, configure_numerics
from elaswave.runtime.digest import parameters_digest
from elaswave.runtime.evaluation import evaluate
from elaswave.runtime.hops import HopRunner
from elaswave.runtime.ledger import LayerAccumulator, Tag, layer_accumulator
from elaswave.runtime.model import HostedModel, initial_blocks
from elaswave.runtime.optimizer import Update, Updater, gradient_norm, update_of
from elaswave.runtime.reduction import reduce_shard
from elaswave.runtime.shards import initial_state, parameters_of
from elaswave.runtime.user_code import UserCode


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceLayout:
    """How the one process pretends to be several: with exact accumulation the results do not depend on it.

    cuts: layers, ascending, before which hops end. replicas: accumulators that take micro-batches in turn. shards:
    parts of each block.
    """

    cuts: tuple[int, ...] = ()
    replicas: int = 1
    shards: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceResult:
    """What a whole run gave; `lines` are the texts of on_step and evaluate in order."""

    steps: tuple[StepResult, ...]
    digest: str
    lines: tuple[str, ...]

    @property
    def losses(self) -> tuple[float, ...]:
        """Mean loss of every step."""
        return tuple(result.loss for result in self.steps)

    @property
    def samples(self) -> tuple[int, ...]:
        """Hash of the samples of every step."""
        return tuple(result.samples for result in self.steps)


def train_reference(
    job: Job,
    layout: ReferenceLayout | None = None,
    on_step: Callable[[StepResult], None] | None = None,
    on_line: Callable[[str], None] | None = None,
) -> ReferenceResult:
    """Run the job to its end in this process. `on_step` sees every result, beside the job's own callback.

    Raises what workers raise: ConfigError, UserCodeError, NonFiniteError.
    """
    configure_numerics()
    trainer = ReferenceTrainer(job, layout or ReferenceLayout())
    results: list[StepResult] = []
    lines: list[str] = []
    for step in range(job.steps):
        result = trainer.step(Step(step))
        results.append(result)
        if on_step is not None:
            on_step(result)
        for line in trainer.call_back(result):
            lines.append(line)
            if on_line is not None:
                on_line(line)
    return ReferenceResult(steps=tuple(results), digest=trainer.digest(), lines=tuple(lines))


class ReferenceTrainer:
    """One job at one version of its parameters."""

    def __init__(self, job: Job, layout: ReferenceLayout) -> None:
        """Builds all layers. Raises ConfigError where the layout does not fit the job."""
        count = len(job.layers)
        self._job = job
        self._edges = [0, *layout.cuts, count]
        if any(left >= right for left, right in zip(self._edges, self._edges[1:], strict=False)):
            raise ConfigError(f"cuts {layout.cuts} must ascend between 1 and {count - 1}")
        self._layout = block_layout(describe_parameters(job))
        self._shape = ModelShape(count, self._layout.blocks, divide_into_shards(self._layout.blocks, layout.shards))
        self._replicas = layout.replicas
        self._device = CpuDevice()
        self._model = HostedModel(job, self._layout, self._device)
        self._model.host(Layer(index) for index in range(count))
        self._runner = HopRunner(job, self._model, MicroBatchLoader(job), self._device)
        self._accumulation = accumulation_of(job)
        self._updater = Updater(job.optimizer)
        blocks = dict(initial_blocks(job, self._layout, map(BlockId, range(len(self._layout.blocks)))))
        self._states = [
            initial_state(job.optimizer, blocks[shard.block][shard.start : shard.stop]) for shard in self._shape.shards
        ]
        self._publish()

    def step(self, step: Step) -> StepResult:
        """Run one step, update the parameters, and give its result."""
        sums: list[dict[Layer, LayerAccumulator]] = [{} for _ in range(self._replicas)]
        loss = LossScalars()
        for index in range(self._job.micro_batches):
            loss += self._micro_batch(step, MicroBatch(index), sums[index % self._replicas])
        reduced = [self._reduce(ShardId(shard), sums) for shard in range(len(self._shape.shards))]
        decision = Decision(
            step=step,
            norm_squared=sum(scalars.norm_squared for _, scalars in reduced),
            finite=all(scalars.finite for _, scalars in reduced),
            loss=loss,
        )
        update = update_of(self._job, decision)
        for state, (gradient, _) in zip(self._states, reduced, strict=True):
            self._updater.apply(state, gradient, update)
        self._publish()
        return result_of(self._job, decision, update)

    def call_back(self, result: StepResult) -> list[str]:
        """Call the job's on_step and, where it is due, evaluate; their texts."""
        texts: list[str | None] = []
        if self._job.on_step is not None:
            with UserCode("on_step"):
                texts.append(self._job.on_step(result))
        if self._job.evaluate is not None and (result.step + 1) % self._job.evaluate_every == 0:
            texts.append(evaluate(self._job, self._model, self._device, result.step))
        return [text for text in texts if text]

    def digest(self) -> str:
        """Digest of the parameters as they are now."""
        return parameters_digest(self._layout, self._model.block)

    def _micro_batch(self, step: Step, micro_batch: MicroBatch, sums: dict[Layer, LayerAccumulator]) -> LossScalars:
        hops = [
            HopKey(step=step, micro_batch=micro_batch, first=Layer(first), last=Layer(last))
            for first, last in zip(self._edges, self._edges[1:], strict=False)
        ]
        value: Tensor | None = None
        non_finite = None
        loss = None
        for hop in hops:
            done = self._runner.forward(hop, value, non_finite)
            value, non_finite, loss = done.output, done.non_finite, done.loss
        gradient: Tensor | None = None
        for hop in reversed(hops):
            back = self._runner.backward(hop, gradient)
            gradient = back.input_gradient
            for found in back.contributions:
                if found.layer not in sums:
                    sums[found.layer] = layer_accumulator(self._accumulation, found.blocks)
                sums[found.layer].add_if(Tag(micro_batch=micro_batch), found.blocks)
        if loss is None:
            raise InvariantError(f"the last hop of micro-batch {micro_batch} gave no loss")
        return loss

    def _reduce(self, index: ShardId, sums: list[dict[Layer, LayerAccumulator]]) -> tuple[Tensor, ShardScalars]:
        shard = self._shape.shards[index]
        if shard.elements == 0:
            parts = [self._accumulation.zeros(0)]
        else:
            layers = self._shape.layers_of_shard(index)
            parts = [found[layer].partial(shard) for found in sums for layer in layers if layer in found]
        return reduce_shard(self._accumulation, parts, self._job.micro_batches)

    def _publish(self) -> None:
        for shard, state in zip(self._shape.shards, self._states, strict=True):
            if shard.elements:
                self._model.install(shard, parameters_of(state, self._model.dtype))


def result_of(job: Job, decision: Decision, update: Update) -> StepResult:
    """What is told about a decided step."""
    return StepResult(
        step=decision.step,
        loss=exact_to_float(decision.loss.loss) / job.micro_batches,
        tokens=decision.loss.tokens,
        samples=decision.loss.samples,
        grad_norm=gradient_norm(decision.norm_squared),
        skipped=update.skip,
    )
