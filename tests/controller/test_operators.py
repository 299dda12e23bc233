"""Calls of operators over real gRPC: status, watch, inject, stop, and the report at the end."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

import grpc
import pytest
from controller_harness import (
    Running,
    controller,
    exited,
    metadata,
    run,
    starting,
)
from grpc import aio

from elaswave._pb import control_pb2 as pb
from elaswave.core.events import (
    Effect,
    Event,
    JobEnded,
    ShowLine,
    StepRecorded,
    StepReported,
    StepResult,
    StopRequested,
    WorkerExited,
    WorkerStarted,
)
from elaswave.core.ids import Step


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
        report.write_text("of an earlier run")
        async with controller(answer, report=report) as running:
            agent = await running.agent()
            opened = asyncio.Event()
            watching = asyncio.create_task(watched(running, "finished", opened))
            await opened.wait()
            message = pb.WorkerMessage(step_result=pb.StepResult(step=4, loss=6.0, tokens=10, samples=4))
            await agent.send(from_worker=pb.FromWorker(worker=0, message=message, received_at=1.0))
            await running.core.wait_for(StepReported)
            assert not report.exists()
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
