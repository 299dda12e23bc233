"""The controller's shell carries out effects: persisted before sent, in order, in time; restarts."""

import time
from collections.abc import Sequence
from pathlib import Path

from controller_harness import (
    LOCAL_START,
    controller,
    exited,
    persist,
    plan,
    run,
    send,
    start,
)

from elaswave._pb import control_pb2 as pb
from elaswave.core.events import (
    AgentAttached,
    CommitCheckpoint,
    Effect,
    Event,
    FenceWorker,
    LinkBroken,
    RestartAll,
    StepRecorded,
    StepReported,
    Tick,
    WorkerExited,
    WorkerStarted,
)
from elaswave.core.ids import NodeId, Step, WorkerId
from elaswave_controller.store import MemoryStore, Outcome


class RefusingStore(MemoryStore):
    """A store in which another controller was faster."""

    async def create_if_absent(self, key: str, value: bytes) -> Outcome:
        await super().create_if_absent(key, b"theirs")
        return await super().create_if_absent(key, value)


def test_a_plan_that_cannot_be_persisted_is_never_sent() -> None:
    def answer(event: Event) -> Sequence[Effect]:
        return [*LOCAL_START, persist(1), send(0, 1)] if isinstance(event, AgentAttached) else ()

    async def body() -> None:
        async with controller(answer, store=RefusingStore()) as running:
            agent = await running.agent()
            ended = await running.ended
            assert ended.exit_code == 1
            assert "another controller runs this job" in ended.message
            assert await agent.receive_kinds(4) == ["start 0", "settings to 0", "start 1", "settings to 1"]
            running.shell.agents.shutdown("over")
            assert await agent.receive_kinds(1) == ["shutdown"]

    run(body())


def test_persisted_plans_are_in_the_store_before_they_are_sent() -> None:
    def answer(event: Event) -> Sequence[Effect]:
        return [*LOCAL_START, persist(1), send(0, 1)] if isinstance(event, AgentAttached) else ()

    async def body() -> None:
        async with controller(answer) as running:
            agent = await running.agent()
            assert (await agent.receive_kinds(5))[-1] == "plan 1 to 0"
            entry = await running.store.get("jobs/job/0/plan")
            assert entry is not None
            assert pb.PlanDelta.FromString(entry.value).epoch == 1

    run(body())


def test_a_late_worker_starts_from_a_whole_plan() -> None:
    def answer(event: Event) -> Sequence[Effect]:
        match event:
            case AgentAttached():
                return [*LOCAL_START, persist(1), persist(2, 1), send(0, 1)]
            case WorkerStarted(worker=1):
                return [persist(3, 2), send(1, 3), send(0, 3)]
        return ()

    async def body() -> None:
        async with controller(answer) as running:
            agent = await running.agent()
            assert (await agent.receive_kinds(6))[-2:] == ["plan 1 to 0", "plan 2 to 0"]
            await agent.send(started=pb.WorkerStarted(worker=1, pid=1))
            whole, delta = await agent.receive(), await agent.receive()
            assert (whole.to_worker.worker, delta.to_worker.worker) == (1, 0)
            assert len(whole.to_worker.message.plan.members_added) == len(plan(3).members)
            assert not delta.to_worker.message.plan.members_added

    run(body())


def test_from_an_exit_to_the_plans_of_all_workers_takes_milliseconds() -> None:
    def answer(event: Event) -> Sequence[Effect]:
        match event:
            case AgentAttached():
                return [*LOCAL_START, persist(1), send(0, 1), send(1, 1)]
            case WorkerExited(worker=worker):
                return [persist(worker, worker - 1), send(0, worker), send(1, worker)]
        return ()

    async def body() -> float:
        async with controller(answer) as running:
            agent = await running.agent()
            await agent.receive_kinds(6)
            times = []
            for epoch in range(2, 42):
                began = time.monotonic()
                await agent.send(exited=exited(epoch))
                await agent.receive_kinds(2)
                times.append(time.monotonic() - began)
            return sorted(times)[len(times) // 2]

    # Both directions over gRPC and the test's own half of the work are in it.
    assert run(body()) < 0.02


def test_the_core_is_ticked_at_its_deadline_and_never_told_falling_times() -> None:
    async def body() -> None:
        async with controller() as running:
            due = time.monotonic() + 0.2
            running.core.deadline = due
            await running.agent()
            await running.core.wait_for(Tick)
            times = [now for _, now in running.core.seen]
            assert times == sorted(times)
            assert times[-1] >= due

    run(body())


def test_fence_goes_to_the_node_of_the_worker() -> None:
    def answer(event: Event) -> Sequence[Effect]:
        match event:
            case AgentAttached(node="b"):
                return [start(0, "a"), start(1, "b")]
            case LinkBroken():
                return [FenceWorker(worker=WorkerId(1), reason="test")]
        return ()

    async def body() -> None:
        async with controller(answer) as running:
            first = await running.agent("a")
            await running.core.wait_for(AgentAttached)
            second = await running.agent("b")
            assert await first.receive_kinds(2) == ["start 0", "settings to 0"]
            assert await second.receive_kinds(2) == ["start 1", "settings to 1"]
            broken = pb.WorkerMessage(link_broken=pb.LinkBroken(peer=1, reason="reset"))
            await first.send(from_worker=pb.FromWorker(worker=0, message=broken, received_at=1.0))
            assert await second.receive_kinds(1) == ["fence 1"]

    run(body())


# ------------------------------------------------------------------ checkpoints and restart


def test_a_restart_kills_all_and_goes_on_with_new_ids(tmp_path: Path) -> None:
    def answer(event: Event) -> Sequence[Effect]:
        match event:
            case AgentAttached():
                return [*LOCAL_START, persist(1)]
            case WorkerStarted():
                return [CommitCheckpoint(step=Step(8), manifests=("{}",)), RestartAll(reason="state lost")]
            case StepReported():
                return [StepRecorded(result=event.result, seconds=0.5)]
        return ()

    async def body() -> None:
        async with controller(answer, save_dir=tmp_path) as running:
            agent = await running.agent()
            await agent.receive_kinds(4)
            await agent.send(started=pb.WorkerStarted(worker=0, pid=1))
            assert sorted(await agent.receive_kinds(2)) == ["fence 0", "fence 1"]
            await agent.send(exited=exited(0))
            await running.core.wait_for(WorkerStarted)
            assert len(running.cores) == 1, "one worker may still be alive"
            await agent.send(exited=exited(1))
            new = await running.core_number(1)
            await new.wait_for(AgentAttached)
            assert new.config.first_worker == 2
            assert not new.config.allow_fresh_start
            assert [event for event, _ in new.seen] == [AgentAttached(node=NodeId("a"), workers=2)]
            assert (tmp_path / "latest").read_text() == "step_8\n"
            assert await agent.receive_kinds(1) == ["start 0"]
            settings = (await agent.receive()).to_worker.message.settings
            assert settings.resume_from == str(tmp_path / "step_8")
            first = await running.store.get("jobs/job/0/plan")
            second = await running.store.get("jobs/job/1/plan")
            assert first is not None
            assert second is not None, "the first plan of the new generation"
            message = pb.WorkerMessage(step_result=pb.StepResult(step=8, loss=6.0, tokens=10, samples=4))
            await agent.send(from_worker=pb.FromWorker(worker=2, message=message, received_at=1.0))
            await new.wait_for(StepReported)
            [incident] = running.shell.status().incidents
            assert (incident.cause, incident.evidence, incident.workers) == ("restart", "state lost", (0, 1))
            # The fence of worker 0 came after its end, and is confirmed now.
            await agent.send(exited=exited(0))
            await agent.send(exited=exited(2))
            await new.wait_for(WorkerExited)
            assert [event.worker for event, _ in new.seen if isinstance(event, WorkerExited)] == [2]

    run(body())


def test_without_a_checkpoint_a_restart_is_the_end() -> None:
    def answer(event: Event) -> Sequence[Effect]:
        return [RestartAll(reason="state lost")] if isinstance(event, AgentAttached) else ()

    async def body() -> None:
        async with controller(answer) as running:
            await running.agent()
            ended = await running.ended
            assert ended.exit_code == 1
            assert "state lost; there is no durable checkpoint" in ended.message

    run(body())


def test_a_job_that_gets_no_further_is_not_restarted_for_ever(tmp_path: Path) -> None:
    async def body() -> None:
        restart = [RestartAll(reason="state lost")]
        async with controller(
            lambda event: restart if isinstance(event, AgentAttached) else (), resume_from=str(tmp_path)
        ) as running:
            await running.agent()
            ended = await running.ended
            assert "got no step further" in ended.message
            assert len(running.cores) == 2

    run(body())
