"""The controller together with the workers' protocols: random runs with failures keep all promises and end well.

A failing run prints its scene and seed: `walk_system(SCENES[scene], seed)` runs it again.
"""

import random
from collections import Counter

import pytest

from elaswave.core import events as ev
from elaswave.core.config import ControllerConfig
from elaswave.core.controller import Controller
from elaswave.core.ids import Epoch, Layer, MicroBatch, NodeId, ShardId, Step, WorkerId
from elaswave.core.plan import Plan
from elaswave.core.shape import CHUNK_ELEMENTS
from elaswave.errors import ElasWaveError
from elaswave.sim.shell import Violation
from elaswave.sim.system import Harm, SystemScene
from elaswave.sim.system_walks import walk_system

RUNS_EACH = 40
LOST = ("owner and all replicas of", "all 1 workers are lost")


def config(dp: int, pp: int, *, nodes: int, each: int = 1, **more: int | str) -> ControllerConfig:
    return ControllerConfig(dp=dp, pp=pp, nnodes=nodes, nproc_per_node=each, shard_elements=CHUNK_ELEMENTS, **more)


SURVIVABLE = {
    "dp2": SystemScene(config=config(2, 1, nodes=2), layers=1, harm=Harm(crashes=1)),
    "dp2, restart": SystemScene(config=config(2, 1, nodes=2, max_restarts=1), layers=1, steps=4, harm=Harm(crashes=1)),
    "2x2, cuts": SystemScene(config=config(2, 2, nodes=4), harm=Harm(crashes=1, cuts=2)),
    "2x2, suspects": SystemScene(config=config(2, 2, nodes=2, each=2), harm=Harm(suspicions=3)),
    "2x2, fenced": SystemScene(config=config(2, 2, nodes=4), harm=Harm(suspicions=1, fences=1)),
    "2x2, node": SystemScene(config=config(2, 2, nodes=2, each=2), steps=4, harm=Harm(nodes=1)),
    "3x1, r=2": SystemScene(config=config(3, 1, nodes=3, replicas=2), layers=1, harm=Harm(crashes=2)),
    "spare": SystemScene(config=config(2, 2, nodes=5, spares=1), steps=4, harm=Harm(crashes=1, cuts=1)),
    "r=0": SystemScene(config=config(2, 1, nodes=2, replicas=0), layers=1, harm=Harm(suspicions=2, cuts=1)),
    "4x1, ring": SystemScene(config=config(4, 1, nodes=4, reduce="ring"), layers=1, harm=Harm(crashes=1, cuts=1)),
    "3x2, ring": SystemScene(
        config=config(3, 2, nodes=3, each=2, reduce="ring", max_restarts=1), steps=5, harm=Harm(crashes=1, cuts=1)
    ),
    "4x1, ring, suspects": SystemScene(
        config=config(4, 1, nodes=4, reduce="ring"), layers=1, steps=4, harm=Harm(suspicions=2)
    ),
    "pp3": SystemScene(config=config(1, 3, nodes=3, max_restarts=1), layers=4, harm=Harm(crashes=1)),
}
"""No more is lost at a time than there are replicas for."""

SEVERE = {
    "dp2, restarts": SystemScene(config=config(2, 1, nodes=2, max_restarts=3), layers=1, steps=5, harm=Harm(crashes=3)),
    "2x2": SystemScene(config=config(2, 2, nodes=4, max_restarts=1), harm=Harm(crashes=2, suspicions=1)),
    "3x1": SystemScene(
        config=config(3, 1, nodes=4, spares=1, max_restarts=1),
        layers=1,
        steps=4,
        harm=Harm(crashes=2, suspicions=2, fences=1, cuts=1),
    ),
}
"""Copies may be lost: then the job says so."""


@pytest.mark.parametrize("name", SURVIVABLE)
def test_the_job_survives(name: str) -> None:
    plans = 0
    for seed in range(RUNS_EACH):
        result = walk_system(SURVIVABLE[name], seed)
        assert isinstance(result.ended, ev.JobEnded)
        assert (result.ended.exit_code, result.ended.message) == (0, ""), f"seed {seed}"
        plans += result.plan.epoch
    assert plans > 3 * RUNS_EACH  # the runs were worth their time: most had failures


@pytest.mark.slow
@pytest.mark.parametrize("name", SEVERE)
def test_the_job_ends_in_order_whatever_happens(name: str) -> None:
    ends: Counter[str] = Counter()
    for seed in range(RUNS_EACH):
        ended = walk_system(SEVERE[name], seed).ended
        assert isinstance(ended, ev.JobEnded)
        assert ended.exit_code == 0 or ended.message.startswith(LOST), f"seed {seed}: {ended}"
        ends["good" if ended.exit_code == 0 else "lost"] += 1
    assert ends["good"] > RUNS_EACH // 4


# ---------------------------------------------------------------------- controllers that err


class SendsBeforeItPersists(Controller):
    def persist(self, plan: Plan) -> None:
        before = len(self.effects)
        super().persist(plan)
        made = self.effects[before:]
        self.effects[before:] = [*made[1:], made[0]]


class CountsOnTheDead(Controller):
    def persist(self, plan: Plan) -> None:
        super().persist(self.plan if self.plan is not None and len(plan.ids) < len(self.plan.ids) else plan)


class ForgetsToAdvance(Controller):
    def advance(self) -> None:
        if self.plan is not None and self.plan.epoch == 1:
            super().advance()


class NeverAdmits(Controller):
    def _admit(self) -> bool:
        return False


@pytest.mark.parametrize("wrong", [SendsBeforeItPersists, CountsOnTheDead, ForgetsToAdvance, NeverAdmits])
def test_a_wrong_controller_is_noticed(wrong: type[Controller]) -> None:
    scene = SURVIVABLE["r=0" if wrong is NeverAdmits else "dp2"]
    with pytest.raises(Violation):
        for seed in range(RUNS_EACH):
            walk_system(scene, seed, controller=wrong)


# ---------------------------------------------------------------------- nonsense

JOB = ev.JobDescription(
    layers=((ev.ParameterDescription(name="w", shape=(2048,)),),) * 2, steps=5, micro_batches=4, digest="job"
)


def nonsense(rng: random.Random) -> ev.Event:
    """Any event about any worker, known or not, at any time."""
    worker, node, now = WorkerId(rng.choice([0, 1, 2, 3, 4, 9])), NodeId(rng.choice("ab")), rng.random()
    step, epoch = Step(rng.randrange(7)), Epoch(rng.randrange(9))
    shards = tuple(ShardId(shard) for shard in range(rng.randrange(6)))
    result = ev.StepResult(step=step, loss=1.0, tokens=1, samples=1, grad_norm=1.0, skipped=False)
    hop = ev.RepairHop(micro_batch=MicroBatch(1), first_layer=Layer(0), backward=True)
    seen = {"noticed_at": now, "last_alive_at": now}
    events: list[ev.Event] = [
        ev.AgentAttached(node=node, workers=2),
        ev.AgentLost(node=node, clean=False, evidence="", noticed_at=now),
        ev.WorkerStarted(worker=worker, pid=1),
        ev.WorkerReady(worker=worker, address="unix:/x", job=JOB, fingerprint=""),
        ev.WorkerExited(worker=worker, exit_code=1, signal=rng.choice([0, 9]), **seen),
        ev.WorkerSuspected(worker=worker, cause="stopped", evidence="", **seen),
        ev.WorkerCleared(worker=worker, evidence=""),
        ev.WorkerReport(
            worker=worker,
            epoch=epoch,
            step=step,
            adoptions=((epoch, step),),
            held=tuple(ev.HeldShard(shard=shard, version=step) for shard in shards),
            finished=rng.random() < 0.2,
            hosted_ready=rng.random() < 0.5,
        ),
        ev.StepReported(worker=worker, result=result, received_at=now),
        ev.WorkDone(worker=worker, epoch=epoch, step=step, hops=(hop,), bytes=1, first_start=now, last_end=now),
        ev.LinkBroken(worker=worker, peer=WorkerId(rng.randrange(9)), reason=""),
        ev.FinalDigest(worker=worker, parameters="x"),
        ev.CheckpointWritten(worker=worker, step=step, shards=shards, manifest="m"),
        ev.UserLine(worker=worker, text="x"),
        ev.Tick(),
    ]
    return rng.choice(events)


@pytest.mark.parametrize("block", range(4))
def test_nonsense_raises_nothing_but_errors_of_ours(block: int) -> None:
    outcomes: Counter[str] = Counter()
    for seed in range(block * 100, block * 100 + 100):
        rng = random.Random(seed)
        controller = Controller(config(2, 2, nodes=2, each=2, max_restarts=2))
        now, epoch = 0.0, 0
        start: list[ev.Event] = [ev.AgentAttached(node=NodeId(node), workers=2) for node in "ab"]
        start += [ev.WorkerReady(worker=WorkerId(w), address="", job=JOB, fingerprint="") for w in range(4)]
        for event in [*(start if rng.random() < 0.8 else []), *(nonsense(rng) for _ in range(60))]:
            now += rng.choice([0.0, 0.1, 5.0])
            try:
                effects = controller.handle(event, now)
            except ElasWaveError as error:
                outcomes[type(error).__name__] += 1
                break
            for effect in effects:
                outcomes[type(effect).__name__] += 1
                if isinstance(effect, ev.PersistPlan):
                    assert effect.plan.epoch == epoch + 1
                    epoch = effect.plan.epoch
                elif isinstance(effect, ev.SendPlans):
                    assert effect.first_epoch <= epoch
    assert {"PersistPlan", "SendPlans", "IncidentClosed", "JobEnded", "ProtocolError"} <= set(outcomes)
