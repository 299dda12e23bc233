"""Streams of agents over real gRPC: settings, losses, refusals, clocks."""

import asyncio
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import grpc
import pytest
from controller_harness import (
    LIMIT_S,
    LOCAL_START,
    FakeAgent,
    controller,
    persist,
    run,
    send,
    starting,
)
from grpc import aio

from elaswave._pb import control_pb2 as pb
from elaswave.core.events import (
    AgentAttached,
    AgentLost,
    Effect,
    Event,
    WorkerExited,
    WorkerStarted,
)
from elaswave.core.ids import WorkerId
from elaswave.core.injection import parse_injection


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
            agent = await running.agent(link_host="10.9.8.7")
            assert await agent.receive_kinds(1) == ["start 0"]
            return (await agent.receive()).to_worker.message.settings

    settings = run(body())
    assert (settings.worker, settings.node, settings.token) == (0, "a", "t" * 32)
    assert (settings.unbuffered, settings.log_cap_bytes, settings.save_dir) == (True, 5, str(tmp_path))
    assert (settings.link_transport, settings.link_host) == ("tcp", "10.9.8.7")


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
            # Without a hello: gRPC calls a refusal that meets a write INTERNAL, and an agent tries again then.
            with pytest.raises(aio.AioRpcError) as refused:
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
