"""The agent and its controller: beats, reconnecting, giving up, leaving."""

import asyncio
import os
import signal
import socket
import time

import pytest
from agent_harness import TOKEN, WORKER, Site, process, running_controller, watching

from elaswave.core.events import StopRequested, UserLine, WorkerExited, WorkerReady, WorkerStarted, WorkerSuspected
from elaswave.core.ids import NodeId, WorkerId
from elaswave.errors import FaultError
from elaswave_agent.stream import ControllerStream, StreamSettings, beat_period_s
from elaswave_agent.wire import encode_hello


def test_beats_come_several_times_within_the_patience_of_the_controller(site: Site) -> None:
    assert [beat_period_s(silence_s) for silence_s in (0.3, 1.5, 3.0, 30.0)] == [0.1, 0.25, 0.5, 0.5]

    async def scenario() -> None:
        async with running_controller() as controller:
            with site.agent(controller.address):
                stream = await controller.attached()
                await controller.until(lambda: len(stream.beats) >= 4)
                assert 1.3 < stream.beats[3] - stream.beats[0] < 4.0

    asyncio.run(scenario())


def test_training_goes_on_without_the_controller_and_the_next_one_learns_of_it(site: Site) -> None:
    async def scenario() -> None:
        async with running_controller() as first:
            with site.agent(first.address) as agent:
                stream = await first.attached()
                for worker in (0, 1):
                    first.start_worker(stream, worker)
                    await first.one(WorkerReady, worker)
                pids = {event.worker: event.pid for event in first.all(WorkerStarted)}
                await first.server.stop(0)
                os.kill(pids[WorkerId(0)], signal.SIGKILL)
                await go_on(int(first.address.rpartition(":")[2]), pids[WorkerId(1)], agent.pid)

    async def go_on(port: int, pid: int, agent_pid: int) -> None:
        async with running_controller(port) as second:
            stream = await second.attached()
            assert (await second.one(WorkerExited, 0)).signal == signal.SIGKILL
            await second.one(WorkerReady, 1)
            assert (await second.one(WorkerStarted, 1)).pid == pid
            assert stream.hello.pid == agent_pid
            second.tell(stream, 1, StopRequested(reason="done"))
            assert (await second.one(WorkerExited, 1)).exit_code == 0
            assert len(second.all(UserLine, 1)) == 1

    asyncio.run(scenario())


def test_agent_gives_up_a_controller_that_stays_away(site: Site) -> None:
    async def scenario() -> None:
        async with running_controller() as controller:
            with site.agent(controller.address, flags=("--controller-limit-s", "0.5")) as agent:
                stream = await controller.attached()
                controller.start_worker(stream, 0)
                await controller.one(WorkerReady, 0)
                pid = (await controller.one(WorkerStarted, 0)).pid
                with watching([pid]) as wait:
                    await controller.server.stop(0)
                    assert await agent.wait_in_loop() == 1
                    assert wait(1.0) == []
                assert "giving up" in agent.log.read_text()

    asyncio.run(scenario())


@pytest.mark.parametrize("listens", [False, True], ids=["ended", "cut off"])
def test_controller_whose_machine_says_that_it_has_ended_is_given_up_sooner(listens: bool) -> None:
    async def scenario() -> None:
        async with running_controller() as controller:
            limits = StreamSettings(
                controller=controller.address, node=NodeId("n0"), token=TOKEN, limit_s=2.0, refused_limit_s=0.2
            )
            hello = encode_hello(NodeId("n0"), 1, os.getpid(), host="here", link_host="127.0.0.1")
            stream = ControllerStream(limits, lambda _: [hello], lambda _: None, lambda _: None)
            running = asyncio.create_task(stream.run())
            await controller.attached()
            await controller.server.stop(0)
            lost_at = time.monotonic()
            with socket.socket() as silent:
                if listens:  # but says nothing, like a machine behind a cut cable
                    silent.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    silent.bind(("127.0.0.1", int(controller.address.rpartition(":")[2])))
                    silent.listen()
                with pytest.raises(FaultError, match="giving up"):
                    await running
            assert (time.monotonic() - lost_at > 2.0) is listens

    asyncio.run(scenario())


def test_agent_with_a_wrong_token_ends_with_the_controllers_reason(site: Site) -> None:
    async def scenario() -> None:
        async with running_controller() as controller:
            command = ["-m", "elaswave_agent", "--controller", controller.address, "--node", "n0", "--workers", "1"]
            command += ["--spawn", "--run-dir", str(site.folder), "--", str(WORKER), "exit", "0"]
            with process(command, site.folder / "log") as agent:
                assert await agent.wait_in_loop() == 1
                assert "wrong token" in agent.log.read_text()

    asyncio.run(scenario())


def test_sigterm_ends_everything_within_five_seconds(site: Site) -> None:
    async def scenario() -> None:
        async with running_controller() as controller:
            with site.agent(controller.address) as agent:
                stream = await controller.attached()
                for worker in range(4):
                    controller.start_worker(stream, worker)
                    await controller.one(WorkerReady, worker)
                # A stopped process takes no SIGTERM; one that is about to be stopped does.
                os.kill((await controller.one(WorkerStarted, 1)).pid, signal.SIGSTOP)
                await controller.one(WorkerSuspected, 1)
                began = time.monotonic()
                agent.send(signal.SIGTERM)
                assert await agent.wait_in_loop() == 0
                assert time.monotonic() - began < 5.0
                await controller.until(lambda: stream.ended)
                assert stream.left
                ends = {event.worker: event.signal for event in controller.all(WorkerExited)}
                assert ends == {0: signal.SIGTERM, 1: signal.SIGKILL, 2: signal.SIGTERM, 3: signal.SIGTERM}

    asyncio.run(scenario())


@pytest.mark.parametrize("launched", [True, False])
def test_ctrl_c_is_the_launchers_business_and_without_one_the_agents(site: Site, launched: bool) -> None:
    async def scenario() -> None:
        async with running_controller() as controller:
            with site.agent(controller.address, launched=launched) as agent:
                stream = await controller.attached()
                controller.start_worker(stream, 0)
                await controller.one(WorkerReady, 0)
                os.kill((await controller.one(WorkerStarted, 0)).pid, signal.SIGINT)
                if launched:
                    agent.send(signal.SIGINT)
                controller.tell(stream, 0, StopRequested(reason="done"))
                assert (await controller.one(WorkerExited, 0)).exit_code == 0
                agent.send(signal.SIGINT)
                controller.start_worker(stream, 1)
                if launched:
                    await controller.one(WorkerReady, 1)
                else:
                    assert await agent.wait_in_loop() == 0

    asyncio.run(scenario())


def test_nothing_is_left_in_shared_memory_or_in_the_run_folder(site: Site) -> None:
    async def scenario() -> None:
        before = set(os.listdir("/dev/shm"))
        async with running_controller() as controller:
            with site.agent(controller.address) as agent:
                stream = await controller.attached()
                controller.start_worker(stream, 0)
                await controller.one(WorkerReady, 0)
                assert set(os.listdir("/dev/shm")) <= before
                agent.send(signal.SIGTERM)
                assert await agent.wait_in_loop() == 0
        assert sorted(path.name for path in site.folder.iterdir()) == ["logs", "n0.log", "token"]

    asyncio.run(scenario())
