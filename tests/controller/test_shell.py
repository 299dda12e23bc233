"""The controller's shell against agents and operators over real gRPC."""

import asyncio
import json
import time
from collections.abc import Coroutine, Sequence
from itertools import count
from pathlib import Path
from typing import TypeVar

import grpc
import pytest
from controller_harness import LIMIT_S, FakeAgent, Running, controller, exited, metadata, persist, plan, start
from grpc import aio

from elaswave._pb import control_pb2 as pb
from elaswave.core.events import (
    AgentAttached,
    AgentLost,
    CommitCheckpoint,
    Effect,
    Event,
    FenceWorker,
    JobEnded,
    LinkBroken,
    RestartAll,
    SendPlans,
    ShowLine,
    StepRecorded,
    StepReported,
    StepResult,
    StopRequested,
    Tick,
    WorkerExited,
    WorkerStarted,
)
from elaswave.core.ids import Epoch, NodeId, Step, WorkerId
from elaswave.core.injection import parse_injection
from elaswave_controller.store import MemoryStore, Outcome

Result = TypeVar("Result")
LOCAL_START = [start(0), start(1)]


def run(work: Coroutine[object, object, Result]) -> Result:
    return asyncio.run(work)


def send(worker: int, epoch: int) -> SendPlans:
    return SendPlans(worker=WorkerId(worker), first_epoch=Epoch(epoch))


def starting(event: Event) -> Sequence[Effect]:
    return LOCAL_START if isinstance(event, AgentAttached) else ()


# ------------------------------------------------------------------ streams of agents


def test_a_worker_gets_settings_then_its_injections_then_plans_in_order() -> None:
    def answer(event: Event) -> Sequence[Effect]:
        match event:
            case AgentAttached():
                return LOCAL_START
            case WorkerStarted(worker=0):
                return [persist(1), send(0, 1), persist(2, 1), persist(3, 2), send(0, 2), send(1, 2)]
        return ()

    async def body() -> None:
        injections = (parse_injection("kill:worker=1,step=3"),)
        async with controller(answer, injections=injections, unbuffered=True, log_cap_bytes=5) as running:
            agent = await running.agent()
            kinds = await agent.receive_kinds(5)
            assert kinds == ["start 0", "settings to 0", "start 1", "settings to 1", "injection to 1"]
            await agent.send(started=pb.WorkerStarted(worker=0, pid=4711))
            kinds = await agent.receive_kinds(5)
            assert kinds == ["plan 1 to 0", "plan 2 to 0", "plan 3 to 0", "plan 2 to 1", "plan 3 to 1"]

    run(body())


def test_settings_hold_what_the_flags_said(tmp_path: Path) -> None:
    async def body() -> pb.Settings:
        more = {"unbuffered": True, "log_cap_bytes": 5, "save_dir": tmp_path, "link_transport": "tcp"}
        async with controller(starting, **more) as running:
            agent = await running.agent(host="elsewhere")
            assert await agent.receive_kinds(1) == ["start 0"]
            return (await agent.receive()).to_worker.message.settings

    settings = run(body())
    assert (settings.worker, settings.node, settings.token) == (0, "a", "t" * 32)
    assert (settings.unbuffered, settings.log_cap_bytes, settings.save_dir) == (True, 5, str(tmp_path))
    assert (settings.link_transport, settings.link_host) == ("tcp", "elsewhere")


def test_a_dead_agent_is_lost_at_once_and_a_leaving_one_is_clean() -> None:
    async def body() -> None:
        async with controller() as running:
            crashing, leaving = await running.agent("crashing"), await running.agent("leaving")
            await running.core.wait_for(AgentAttached, 2)
            await leaving.leave()
            [left] = await running.core.wait_for(AgentLost)
            began = time.monotonic()
            crashing.call.cancel()
            _, crashed = await running.core.wait_for(AgentLost, 2)
            assert isinstance(left, AgentLost)
            assert isinstance(crashed, AgentLost)
            assert (left.node, left.clean) == ("leaving", True)
            assert (crashed.node, crashed.clean) == ("crashing", False)
            assert crashed.noticed_at - began < 1.0

    run(body())


def test_an_agent_without_beats_is_given_up_and_one_with_beats_is_not() -> None:
    async def beat(agent: FakeAgent) -> None:
        for sequence in count():
            await agent.send(beat=pb.Beat(sequence=sequence))
            assert (await agent.receive()).beat.sequence == sequence

    async def body() -> None:
        async with controller(node_suspect_s=0.5) as running:
            silent, beating = await running.agent("silent"), await running.agent("beating")
            beats = asyncio.create_task(beat(beating))
            [lost] = await running.core.wait_for(AgentLost)
            assert isinstance(lost, AgentLost)
            assert (lost.node, lost.clean) == ("silent", False)
            assert "no sign of life for" in lost.evidence
            with pytest.raises(aio.AioRpcError) as refused:
                await silent.receive()
            assert refused.value.code() is grpc.StatusCode.ABORTED
            assert not beats.done()
            beats.cancel()
            assert [agent.hello.node for agent in running.shell.agents.connections] == ["beating"]

    run(body())


@pytest.mark.parametrize(
    ("hello", "code"),
    [
        ({"beat": pb.Beat()}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"hello": pb.AgentHello(node="", workers=1)}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"hello": pb.AgentHello(node="b", workers=0)}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"hello": pb.AgentHello(node="a", workers=1)}, grpc.StatusCode.ALREADY_EXISTS),
    ],
)
def test_agents_that_are_not_wanted_are_refused(hello: dict[str, object], code: grpc.StatusCode) -> None:
    async def body() -> None:
        async with controller() as running:
            await running.agent("a")
            await running.core.wait_for(AgentAttached)
            agent = FakeAgent(running.address)
            running.agents.append(agent)
            await agent.send(**hello)
            with pytest.raises(aio.AioRpcError) as refused:
                await agent.receive()
            assert refused.value.code() is code
            assert len(running.core.seen) == 1

    run(body())


def test_a_wrong_token_opens_nothing() -> None:
    async def body() -> None:
        async with controller() as running:
            agent = FakeAgent(running.address, token="guess")
            running.agents.append(agent)
            with pytest.raises(aio.AioRpcError) as refused:
                await agent.hello()
                await agent.receive()
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
            for call in (
                running.operator.Status(pb.StatusRequest()),
                running.operator.Stop(pb.StopRequest()),
                running.operator.Inject(pb.InjectRequest()),
            ):
                with pytest.raises(aio.AioRpcError) as error:
                    await call
                assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert running.core.seen == []

    run(body())


def test_garbage_from_an_agent_is_the_loss_of_its_node() -> None:
    async def body() -> None:
        async with controller() as running:
            agent = await running.agent()
            nonsense = pb.WorkerSuspected(worker=0, cause="bored")
            await agent.send(suspected=nonsense)
            [lost] = await running.core.wait_for(AgentLost)
            assert isinstance(lost, AgentLost)
            assert "WorkerSuspected.cause" in lost.evidence

    run(body())


def test_times_of_another_machine_are_taken_as_distances() -> None:
    async def body() -> None:
        async with controller() as running:
            far = await running.agent("far", host="elsewhere")
            near = await running.agent("near")
            await far.send(exited=pb.WorkerExited(worker=0, noticed_at=1e6, last_alive_at=1e6 - 0.5))
            await near.send(exited=pb.WorkerExited(worker=1, noticed_at=5.0, last_alive_at=4.0))
            found = {}
            for event in await running.core.wait_for(WorkerExited, 2):
                assert isinstance(event, WorkerExited)
                found[event.worker] = event
            assert abs(found[WorkerId(0)].noticed_at - time.monotonic()) < LIMIT_S
            assert found[WorkerId(0)].noticed_at - found[WorkerId(0)].last_alive_at == pytest.approx(0.5)
            assert (found[WorkerId(1)].noticed_at, found[WorkerId(1)].last_alive_at) == (5.0, 4.0)

    run(body())


# ------------------------------------------------------------------ effects


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
            entry = await running.store.get("jobs/job/plan")
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


# ------------------------------------------------------------------ operators


def result(step: int) -> StepResult:
    return StepResult(step=Step(step), loss=2.0 + step, tokens=10, samples=step, grad_norm=1.0, skipped=False)


async def watched(running: Running, until: str, opened: asyncio.Event | None = None) -> list[pb.WatchResponse]:
    found = []
    async for message in running.operator.Watch(pb.WatchRequest(), metadata=metadata()):
        found.append(message)
        if opened is not None:
            opened.set()
        if message.WhichOneof("body") == until:
            break
    return found


def test_status_has_the_jobs_name_and_pids() -> None:
    async def body() -> None:
        async with controller(starting) as running:
            agent = await running.agent()
            await agent.send(started=pb.WorkerStarted(worker=0, pid=4711))
            await running.core.wait_for(WorkerStarted)
            status = await running.operator.Status(pb.StatusRequest(), metadata=metadata())
            assert (status.job, status.epoch, status.step, status.steps) == ("job", 7, 3, 9)
            assert status.workers[0].pid == 4711
            await agent.send(exited=exited(0))
            await running.core.wait_for(WorkerExited)
            status = await running.operator.Status(pb.StatusRequest(), metadata=metadata())
            assert status.workers[0].pid == 0

    run(body())


def test_watchers_see_steps_lines_and_the_end(tmp_path: Path) -> None:
    def answer(event: Event) -> Sequence[Effect]:
        match event:
            case StepReported():
                return [StepRecorded(result=event.result, seconds=0.5), ShowLine(text="a line")]
            case StopRequested():
                return [JobEnded(exit_code=0, message="", digest="d")]
        return ()

    async def body() -> None:
        report = tmp_path / "report.json"
        async with controller(answer, report=report) as running:
            agent = await running.agent()
            opened = asyncio.Event()
            watching = asyncio.create_task(watched(running, "finished", opened))
            await opened.wait()
            message = pb.WorkerMessage(step_result=pb.StepResult(step=4, loss=6.0, tokens=10, samples=4))
            await agent.send(from_worker=pb.FromWorker(worker=0, message=message, received_at=1.0))
            await running.core.wait_for(StepReported)
            await running.operator.Stop(pb.StopRequest(reason="enough"), metadata=metadata())
            items = await watching
            kinds = [item.WhichOneof("body") for item in items if item.WhichOneof("body") != "status"]
            assert items[0].WhichOneof("body") == "status"
            assert kinds == ["step", "line", "finished"]
            assert items[-1].finished.exit_code == 0
            late = await watched(running, "finished")
            assert late[-1].finished.exit_code == 0, "who comes late is told as well"
            content = json.loads(report.read_text())
            assert (content["losses"], content["digest"], content["steps"]) == (["6.0"], "d", 5)

    run(body())


def test_a_refused_job_leaves_no_report(tmp_path: Path) -> None:
    async def body() -> None:
        report = tmp_path / "report.json"
        async with controller(lambda event: [JobEnded(exit_code=93, message="7 layers")], report=report) as running:
            await running.agent()
            assert (await running.ended).exit_code == 93
            assert not report.exists()

    run(body())


def test_a_bug_in_the_core_ends_the_job_loudly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(event: Event) -> Sequence[Effect]:
        raise KeyError("no such layer")

    async def body() -> None:
        report = tmp_path / "report.json"
        async with controller(answer, report=report) as running:
            await running.agent()
            ended = await running.ended
            assert ended.exit_code == 1
            assert "no such layer" in ended.message
            assert json.loads(report.read_text())["exit_code"] == 1

    run(body())
    assert "no such layer" in capsys.readouterr().err


def test_injections_reach_the_worker_and_unknown_workers_are_named() -> None:
    async def body() -> None:
        async with controller(starting) as running:
            agent = await running.agent()
            await agent.receive_kinds(4)
            injection = pb.Injection(action="stop", worker=1, phase="any")
            await running.operator.Inject(pb.InjectRequest(injection=injection), metadata=metadata())
            assert await agent.receive_kinds(1) == ["injection to 1"]
            for wrong, code in (
                (pb.Injection(action="stop", worker=9, phase="any"), grpc.StatusCode.NOT_FOUND),
                (pb.Injection(action="explode", worker=1, phase="any"), grpc.StatusCode.INVALID_ARGUMENT),
            ):
                with pytest.raises(aio.AioRpcError) as refused:
                    await running.operator.Inject(pb.InjectRequest(injection=wrong), metadata=metadata())
                assert refused.value.code() is code

    run(body())


# ------------------------------------------------------------------ checkpoints and restart


def test_a_restart_kills_all_and_goes_on_with_new_ids_and_epochs(tmp_path: Path) -> None:
    def answer(event: Event) -> Sequence[Effect]:
        match event:
            case AgentAttached():
                return [*LOCAL_START, persist(1)]
            case WorkerStarted():
                return [CommitCheckpoint(step=Step(8), manifests=("{}",)), RestartAll(reason="state lost")]
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
            assert (new.config.first_worker, new.config.first_epoch) == (2, 2)
            assert not new.config.allow_fresh_start
            assert [event for event, _ in new.seen] == [AgentAttached(node=NodeId("a"), workers=2)]
            assert (tmp_path / "latest").read_text() == "step_8\n"

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
