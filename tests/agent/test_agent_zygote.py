"""Workers forked from a zygote that has imported torch."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from agent_harness import (
    LIMIT_S,
    Attached,
    Controller,
    Process,
    Site,
    python_environment,
    running_controller,
    watching,
)

from elaswave.core.events import UserLine, WorkerExited, WorkerFailed, WorkerStarted, WorkerSuspected
from elaswave.core.ids import WorkerId
from elaswave.process_start import (
    Message,
    MessageDecoder,
    Program,
    Started,
    StartRequest,
    Unavailable,
    WorkerEnded,
    encode,
)
from elaswave.runtime.zygote import Zygote, listen, unsound_reason

SCRIPT = str(Path(__file__).with_name("torch_script.py"))
MEBIBYTE = 1 << 20


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Process, str]]:
    with tempfile.TemporaryDirectory(prefix="ew-") as folder, Site(Path(folder)).zygote() as made:
        yield made


async def _start_and_wait(controller: Controller, stream: Attached, worker: int) -> int:
    controller.start_worker(stream, worker)
    await controller.one(UserLine, worker)
    return (await controller.one(WorkerStarted, worker)).pid


def test_forked_worker_is_as_good_as_a_fresh_one(site: Site, zygote: tuple[Process, str]) -> None:
    async def scenario() -> None:
        async with running_controller() as controller:
            with site.agent(controller.address, SCRIPT, "facts", zygote=zygote[1], MARK="this agent's") as agent:
                stream = await controller.attached()
                controller.start_worker(stream, 0)
                exited = await controller.one(WorkerExited, 0)
                assert (exited.exit_code, exited.signal) == (0, 0), site.output(0, "err")
                lines = [line.text for line in controller.all(UserLine, 0)]
                threads, gradient, mark, folder, grpc, descriptors, parent, private = lines
                assert int(parent) == zygote[0].pid, zygote[0].log.read_text()
                assert (threads, gradient) == ("1", "tensor([2., 2., 2.])")
                assert (mark, folder, grpc) == ("this agent's", os.getcwd(), "[]")
                # Input, output, and the link's: nothing of the zygote or of a sibling.
                assert descriptors.split(",") == sorted(
                    ["null", "rank_0.out", "rank_0.err", "socket", "memfd", "eventfd", "eventpoll"]
                )
                assert int(private) * 1024 < 30 * MEBIBYTE
                controller.shut_down(stream)
                assert await agent.wait_in_loop() == 0

    asyncio.run(scenario())


def test_exception_in_a_fork_is_told_once(site: Site, zygote: tuple[Process, str]) -> None:
    async def scenario() -> None:
        async with running_controller() as controller:
            with site.agent(controller.address, SCRIPT, "raise", zygote=zygote[1]):
                stream = await controller.attached()
                controller.start_worker(stream, 0)
                assert (await controller.one(WorkerExited, 0)).exit_code == 1
                (failed,) = controller.all(WorkerFailed)
                assert (failed.kind, failed.message) == ("user", "ValueError: in a fork")
                assert "torch_script.py" in failed.traceback.splitlines()[1]

    asyncio.run(scenario())


def test_signals_of_forked_workers_are_seen(site: Site, zygote: tuple[Process, str]) -> None:
    async def scenario() -> None:
        async with running_controller() as controller:
            with site.agent(controller.address, SCRIPT, "wait", zygote=zygote[1]):
                stream = await controller.attached()
                pids = [await _start_and_wait(controller, stream, worker) for worker in (0, 1)]
                os.kill(pids[0], signal.SIGKILL)
                os.kill(pids[1], signal.SIGSTOP)
                assert (await controller.one(WorkerExited, 0, 0.25)).signal == signal.SIGKILL
                assert (await controller.one(WorkerSuspected, 1, 1.0)).cause == "stopped"

    asyncio.run(scenario())


def test_killed_agent_takes_its_forked_workers_and_no_others(site: Site, zygote: tuple[Process, str]) -> None:
    async def scenario() -> None:
        async with running_controller() as controller:
            with (
                site.agent(controller.address, SCRIPT, "wait", zygote=zygote[1], node="n0") as doomed,
                site.agent(controller.address, SCRIPT, "wait", zygote=zygote[1], node="n1"),
            ):
                await controller.attached(2)
                streams = {stream.hello.node: stream for stream in controller.streams}
                lost = [await _start_and_wait(controller, streams["n0"], worker) for worker in (0, 1)]
                kept = await _start_and_wait(controller, streams["n1"], 2)
                os.kill(lost[1], signal.SIGSTOP)
                with watching(lost) as wait:
                    doomed.send(signal.SIGKILL)
                    assert await asyncio.to_thread(wait, 5.0) == []
                os.kill(kept, signal.SIGUSR1)
                assert (await controller.one(WorkerExited, 2)).signal == signal.SIGUSR1, "it was alive until then"

    asyncio.run(scenario())


def test_fifty_starts_leave_no_descriptor_behind(site: Site, zygote: tuple[Process, str]) -> None:
    async def scenario() -> None:
        async with running_controller() as controller:
            with site.agent(controller.address, SCRIPT, "nothing", zygote=zygote[1]) as agent:
                stream = await controller.attached()
                watched = [psutil.Process(agent.pid), psutil.Process(zygote[0].pid)]

                async def run(worker: int) -> list[int]:
                    controller.start_worker(stream, worker)
                    await controller.one(WorkerExited, worker)
                    return [process.num_fds() for process in watched]

                before = await run(0)
                for worker in range(1, 50):
                    await run(worker)
                assert await run(50) == before

    asyncio.run(scenario())


def test_workers_die_with_a_killed_parent_of_the_zygote(site: Site) -> None:
    """The parent stands in for the launcher, this process for the agent, whose end would kill the worker too."""
    script = site.folder / "waiter.py"
    script.write_text("import threading\nthreading.Event().wait()\n")
    path = str(site.folder / "zygote")
    request = StartRequest(
        worker=WorkerId(0),
        program=Program(target=str(script)),
        environment=(),
        working_directory="/",
        stdout=str(site.folder / "out"),
        stderr=str(site.folder / "err"),
    )
    with (
        subprocess.Popen(
            [sys.executable, "-c", PARENT, path], env=python_environment(), stdout=subprocess.PIPE
        ) as parent,
        socket.socket(socket.AF_UNIX) as agent,
    ):
        assert parent.stdout is not None
        zygote_pid = int(parent.stdout.readline())
        agent.settimeout(LIMIT_S)
        agent.connect(path)
        agent.sendall(encode(request))
        (started,) = MessageDecoder().feed(agent.recv(1000))
        assert isinstance(started, Started)
        with watching([zygote_pid, started.pid]) as wait:
            parent.kill()
            assert wait(5.0) == []


def test_a_worker_that_is_ended_while_it_is_forked_ends(site: Site) -> None:
    """What a handler raises in a hook of a fork is shown and dropped; the signal must not be."""
    path = str(site.folder / "zygote")
    log = site.folder / "log"
    request = StartRequest(
        worker=WorkerId(0), program=Program(target="never"), environment=(), working_directory="/", stdout="", stderr=""
    )
    with (
        log.open("w") as said,
        subprocess.Popen([sys.executable, "-c", ENDED_IN_FORK, path], env=python_environment(), stderr=said) as zygote,
        socket.socket(socket.AF_UNIX) as agent,
    ):
        agent.settimeout(LIMIT_S)
        try:
            with watching([zygote.pid]) as wait:
                while agent.connect_ex(path):
                    assert wait(0.02) == [zygote.pid], log.read_text()
            agent.sendall(encode(request))
            decoder, found = MessageDecoder(), list[Message]()
            while len(found) < 2:
                found += decoder.feed(agent.recv(1000))
        finally:
            zygote.kill()
    assert isinstance(found[0], Started)
    assert found[1] == WorkerEnded(worker=WorkerId(0), exit_code=0, signal=0), log.read_text()
    assert "Traceback" not in log.read_text()


# A zygote whose children get SIGTERM before they have begun; one that goes on as a worker ends with 99.
ENDED_IN_FORK = """
import os, signal, sys
from elaswave.runtime import zygote

os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGTERM))
signal.signal(signal.SIGTERM, zygote._end)
zygote.Zygote(zygote.listen(sys.argv[1])).serve()
os._exit(99)
"""

# Prints the zygote's pid when it listens.
PARENT = """
import os, socket, subprocess, sys, threading

command = [sys.executable, "-m", "elaswave.runtime.zygote", "--socket", sys.argv[1], "--parent-pid", str(os.getpid())]
zygote = subprocess.Popen(command)
never = threading.Event()
with socket.socket(socket.AF_UNIX) as probe:
    while probe.connect_ex(sys.argv[1]) and zygote.poll() is None:
        never.wait(0.02)
print(zygote.pid, flush=True)
never.wait()
"""


def test_fence_reaches_a_worker_that_is_just_being_started(site: Site, zygote: tuple[Process, str]) -> None:
    async def scenario() -> None:
        async with running_controller() as controller:
            with site.agent(controller.address, SCRIPT, "wait", zygote=zygote[1]):
                stream = await controller.attached()
                zygote[0].send(signal.SIGSTOP)
                try:
                    controller.start_worker(stream, 0)
                    controller.fence(stream, 0)
                    # Orders are carried out in order: the answer to this one shows that the fence has been taken.
                    controller.fence(stream, 9)
                    await controller.one(WorkerExited, 9)
                finally:
                    zygote[0].send(signal.SIGCONT)
                assert (await controller.one(WorkerExited, 0)).signal == signal.SIGKILL
                assert not controller.all(UserLine, 0)

    asyncio.run(scenario())


def test_end_of_the_zygote_is_the_end_of_its_workers_and_the_next_one_is_spawned(site: Site) -> None:
    async def scenario() -> None:
        async with running_controller() as controller:
            with (
                site.zygote() as (zygote, path),
                site.agent(controller.address, SCRIPT, "wait", zygote=path) as agent,
            ):
                stream = await controller.attached()
                await _start_and_wait(controller, stream, 0)
                zygote.send(signal.SIGTERM)
                assert (await controller.one(WorkerExited, 0)).signal == signal.SIGKILL
                assert await zygote.wait_in_loop() == 0
                assert not Path(path).exists()
                await _start_and_wait(controller, stream, 1)
                assert "workers are spawned instead" in agent.log.read_text()

    asyncio.run(scenario())


def test_without_a_zygote_workers_are_spawned(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    path = site.folder / "zygote"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        answers = threading.Thread(target=_refuse_one, args=(listener,))
        answers.start()

        async def scenario() -> None:
            async with running_controller() as controller:
                with site.agent(controller.address, zygote=str(path)) as agent:
                    stream = await controller.attached()
                    controller.start_worker(stream, 0)
                    await controller.one(WorkerStarted, 0)
                    assert "CUDA was touched" in agent.log.read_text()

        asyncio.run(scenario())
        answers.join(LIMIT_S)


def _refuse_one(listener: socket.socket) -> None:
    zygote = Zygote(listener)
    listener.setblocking(True)
    listener.settimeout(LIMIT_S)
    zygote._accept()  # type: ignore[attr-defined]
    listener.setblocking(False)
    zygote.refuse_all("CUDA was touched")
    zygote.close()


# ------------------------------------------------------------------ what makes a fork unsound


def test_threads_make_a_fork_unsound() -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        assert "threads run" in unsound_reason()
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("pass", ""),
        ("import grpc", "grpc was imported"),
        ("import os; os.dup2(os.open('/dev/null', 0), 0)", ""),
    ],
)
def test_reasons_against_a_fork(statement: str, reason: str) -> None:
    code = f"from elaswave.runtime.zygote import unsound_reason; {statement}; print(unsound_reason())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=python_environment(OMP_NUM_THREADS="1", GRPC_ENABLE_FORK_SUPPORT="0"),
        check=True, capture_output=True, text=True, timeout=LIMIT_S,
    )  # fmt: skip
    assert done.stdout.startswith(reason or "\n")


def test_initialised_cuda_makes_a_fork_unsound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr("elaswave.runtime.zygote.os.listdir", lambda _: ["0"])
    monkeypatch.delitem(sys.modules, "grpc", raising=False)
    assert "CUDA was initialised" in unsound_reason()


def test_open_accelerator_makes_a_fork_unsound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elaswave.runtime.zygote.os.listdir", lambda _: ["0"])
    monkeypatch.setattr("elaswave.runtime.zygote.os.readlink", lambda _: "/dev/nvidia0")
    monkeypatch.delitem(sys.modules, "grpc", raising=False)
    assert "/dev/nvidia0" in unsound_reason()


def test_refused_agents_are_told_why(site: Site) -> None:
    path = str(site.folder / "zygote")
    zygote = Zygote(listen(path))
    with socket.socket(socket.AF_UNIX) as agent:
        agent.connect(path)
        zygote.refuse_all("two threads")
        zygote.close()
        assert MessageDecoder().feed(agent.recv(1000)) == [Unavailable(reason="two threads")]
