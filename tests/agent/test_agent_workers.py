"""An agent with real worker processes (spawned): their life from start to exit, as the controller is told of it."""

import asyncio
import os
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from agent_harness import LIMIT_S, WORKER, Attached, Controller, Site, python_environment, running_controller, watching

from elaswave.core.events import (
    StopRequested,
    UserLine,
    WorkerCleared,
    WorkerExited,
    WorkerFailed,
    WorkerReady,
    WorkerStarted,
    WorkerSuspected,
)
from elaswave.core.ids import NodeId, Step, WorkerId
from elaswave.core.injection import Injection
from elaswave.core.settings import WorkerSettings
from elaswave.handshake import Role, encode_hello
from held_end import held_end


def run_script(
    site: Site, *script: str, flags: tuple[str, ...] = (), **environment: str
) -> tuple[Controller, Attached]:
    """One worker with this script, to its end."""

    async def scenario() -> tuple[Controller, Attached]:
        async with running_controller() as controller:
            with site.agent(controller.address, *script, flags=flags, **environment) as agent:
                stream = await controller.attached()
                controller.start_worker(stream, 5, rank=2, restart_count=1)
                await controller.one(WorkerExited, 5)
                controller.shut_down(stream)
                assert await agent.wait_in_loop() == 0
            return controller, stream

    return asyncio.run(scenario())


def test_start_is_told_before_exit_and_the_agent_leaves_cleanly(site: Site) -> None:
    controller, stream = run_script(site, str(WORKER), "exit", "0")
    assert [type(event) for _, event in stream.told] == [WorkerStarted, WorkerExited]
    assert (controller.all(WorkerExited)[0].exit_code, controller.all(WorkerExited)[0].signal) == (0, 0)
    assert stream.left
    assert (stream.hello.node, stream.hello.workers) == ("n0", 4)
    assert not Path(site.folder, "n0.agent").exists()


def test_failing_exit_code_is_the_scripts_failure(site: Site) -> None:
    controller, _ = run_script(site, str(WORKER), "exit", "3")
    assert controller.all(WorkerExited)[0].exit_code == 3
    (failed,) = controller.all(WorkerFailed)
    assert (failed.kind, failed.worker) == ("user", 5)
    assert "exit code 3" in failed.message


def test_exit_text_goes_to_stderr_and_to_the_controller(site: Site) -> None:
    controller, _ = run_script(site, str(WORKER), "exit-text", "no", "data")
    assert controller.all(WorkerExited)[0].exit_code == 1
    assert site.output(2, "err") == "no data\n"
    assert "no data" in controller.all(WorkerFailed)[0].message


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ("ValueError", "user"),
        ("InvariantError", "bug"),
        ("KeyboardInterrupt", "user"),
    ],
)
def test_exception_is_told_once_with_the_scripts_traceback(site: Site, error: str, kind: str) -> None:
    controller, stream = run_script(site, str(WORKER), "raise", error, "what", "went", "wrong")
    (failed,) = controller.all(WorkerFailed)
    assert failed.kind == kind
    assert failed.message.endswith(f"{error}: what went wrong")
    assert failed.traceback.count("Traceback") == 1
    assert "worker_script.py" in failed.traceback.splitlines()[1], "frames before the script are of no use to a user"
    assert site.output(2, "err") == failed.traceback
    assert controller.all(WorkerExited)[0].exit_code == 1
    assert [type(event) for _, event in stream.told] == [WorkerStarted, WorkerFailed, WorkerExited]


@pytest.mark.parametrize(("error", "kind"), [("ConfigError", "config"), ("NonFiniteError", "non-finite")])
def test_errors_whose_message_says_all_are_told_without_traceback(site: Site, error: str, kind: str) -> None:
    controller, _ = run_script(site, str(WORKER), "raise", error, "what", "went", "wrong")
    (failed,) = controller.all(WorkerFailed)
    assert (failed.kind, failed.message, failed.traceback) == (kind, "what went wrong", "")
    assert site.output(2, "err") == "what went wrong\n"


def test_missing_script_is_told(site: Site) -> None:
    controller, _ = run_script(site, str(site.folder / "nowhere.py"))
    assert "nowhere.py" in controller.all(WorkerFailed)[0].message
    assert controller.all(WorkerExited)[0].exit_code == 1


def test_module_with_arguments(site: Site) -> None:
    (site.folder / "modules").mkdir()
    (site.folder / "modules" / "trainer.py").write_text("import sys\nprint(__name__, sys.argv[1:], sys.stdin.read())\n")
    path = f"{python_environment()['PYTHONPATH']}:{site.folder / 'modules'}"
    run_script(site, "trainer", "--", "-x", "y z", flags=("--module",), PYTHONPATH=path)
    assert site.output(2) == "__main__ ['--', '-x', 'y z'] \n"


def test_environment_is_torchruns_and_ours(site: Site) -> None:
    expected = {
        "RANK": "2", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "3",
        "GROUP_WORLD_SIZE": "6", "ROLE_RANK": "2", "ROLE_WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.7",
        "MASTER_PORT": "1234", "TORCHELASTIC_RUN_ID": "run", "TORCHELASTIC_RESTART_COUNT": "1",
        "TORCHELASTIC_MAX_RESTARTS": "9", "OMP_NUM_THREADS": "3", "ELASWAVE_WORKER": "5", "ELASWAVE_NODE": "n0",
        "ELASWAVE_AGENT_SOCK": str(site.folder / "n0.agent"), "ELASWAVE_RUN_DIR": str(site.folder),
    }  # fmt: skip
    flags = ("--node-rank", "3", "--nnodes", "6", "--master-addr", "10.0.0.7", "--master-port", "1234")
    controller, _ = run_script(
        site,
        *(str(WORKER), "environment", *expected),
        flags=(*flags, "--max-restarts", "9"),
        OMP_NUM_THREADS="3",
    )
    assert [line.text for line in controller.all(UserLine)] == [f"{name}={value}" for name, value in expected.items()]


def test_output_is_appended_and_complete(site: Site) -> None:
    run_script(site, str(WORKER), "print")
    run_script(site, str(WORKER), "print")
    assert site.output(2) == "to stdout\n" * 2
    assert site.output(2, "err") == "to stderr\n" * 2


def test_end_of_a_script_is_that_of_an_interpreter(site: Site) -> None:
    controller, _ = run_script(site, str(WORKER), "leave-open", str(site.folder / "file"))
    assert (site.folder / "file").read_text() == "flushed\n"
    output = site.output(2)
    assert output.endswith("exit function\n")
    assert "thread" in output
    assert "no newline" in output
    assert controller.all(WorkerExited)[0].exit_code == 0


def test_script_sees_what_it_would_see_without_us(site: Site) -> None:
    controller, _ = run_script(site, str(WORKER), "facts", "--", "-v")
    argv, name, path, descriptors = [line.text for line in controller.all(UserLine)]
    assert argv == repr([str(WORKER), "facts", "--", "-v"])
    assert name == "'__main__'"
    assert path == str(WORKER.parent)
    assert descriptors == "3"


@pytest.mark.parametrize("end", [(), (str(int(signal.SIGKILL)),)])
def test_last_words_are_told_before_the_exit(site: Site, end: tuple[str, ...]) -> None:
    _, stream = run_script(site, str(WORKER), "last-words", "3000", *end)
    lines = [event.text for _, event in stream.told if isinstance(event, UserLine)]
    assert lines == [f"line {index}" for index in range(3000)]
    assert isinstance(stream.told[-1][1], WorkerExited)


# ------------------------------------------------------------------ a worker that serves


async def _serving(controller: Controller, stream: Attached, worker: int) -> int:
    controller.start_worker(stream, worker)
    await controller.one(WorkerReady, worker)
    return (await controller.one(WorkerStarted, worker)).pid


def test_sigkill_is_seen_at_once_with_the_last_progress(site: Site) -> None:
    async def scenario() -> None:
        async with running_controller() as controller:
            with site.agent(controller.address):
                stream = await controller.attached()
                pid = await _serving(controller, stream, 0)
                killed_at = time.monotonic()
                os.kill(pid, signal.SIGKILL)
                exited = await controller.one(WorkerExited, 0)
                assert time.monotonic() - killed_at < 0.25
                assert killed_at <= exited.noticed_at < killed_at + 0.25
                assert killed_at - 0.5 < exited.last_alive_at <= exited.noticed_at
                assert (exited.exit_code, exited.signal) == (0, signal.SIGKILL)
                assert (exited.progress.step, exited.progress.phase) == (7, "forward")
                assert (exited.progress.forward_begun, exited.progress.forward_done) == (1 << 3, 0)

    asyncio.run(scenario())


def test_killed_worker_is_suspected_before_the_kernel_has_ended_it(site: Site) -> None:
    async def scenario() -> None:
        async with running_controller() as controller:
            with site.agent(controller.address):
                stream = await controller.attached()
                pid = await _serving(controller, stream, 0)
                with held_end(pid) as wait_for_begin:
                    killed_at = time.monotonic()
                    os.kill(pid, signal.SIGKILL)
                    suspected = await controller.one(WorkerSuspected, 0)
                    assert time.monotonic() - killed_at < 0.25
                    assert suspected.cause == "killed"
                    assert suspected.progress.step == 7
                    wait_for_begin(LIMIT_S)
                    assert not controller.all(WorkerExited)
                assert (await controller.one(WorkerExited, 0)).signal == signal.SIGKILL
                assert len(controller.all(WorkerSuspected)) == 1
                assert not controller.all(WorkerCleared)

    asyncio.run(scenario())


def test_agent_ends_before_the_kernel_has_ended_its_worker(site: Site) -> None:
    async def scenario() -> None:
        async with running_controller() as controller:
            with site.agent(controller.address) as agent:
                stream = await controller.attached()
                pid = await _serving(controller, stream, 0)
                with held_end(pid):
                    os.kill(pid, signal.SIGKILL)
                    await controller.one(WorkerSuspected, 0)
                    controller.shut_down(stream)
                    assert await agent.wait_in_loop() == 0
                assert stream.left

    asyncio.run(scenario())


def test_sigstop_is_suspected_within_a_second_and_cleared_by_sigcont(site: Site) -> None:
    async def scenario() -> None:
        async with running_controller() as controller:
            with site.agent(controller.address):
                stream = await controller.attached()
                pid = await _serving(controller, stream, 0)
                stopped_at = time.monotonic()
                os.kill(pid, signal.SIGSTOP)
                suspected = await controller.one(WorkerSuspected, 0)
                assert time.monotonic() - stopped_at < 1.0
                assert suspected.cause == "stopped"
                assert suspected.progress.step == 7
                os.kill(pid, signal.SIGCONT)
                await controller.one(WorkerCleared, 0, limit_s=2.0)
                assert len(controller.all(WorkerSuspected)) == 1
                assert not controller.all(WorkerExited)

    asyncio.run(scenario())


def test_worker_that_is_stopped_as_soon_as_it_is_known_does_not_outlive_its_agent(site: Site) -> None:
    async def scenario() -> None:
        async with running_controller() as controller:
            with site.agent(controller.address, str(WORKER), "wait") as agent:
                controller.start_worker(await controller.attached(), 0)
                worker = psutil.Process((await controller.one(WorkerStarted, 0)).pid)
                worker.suspend()
                agent.send(signal.SIGKILL)
                await agent.wait_in_loop()
                _, alive = psutil.wait_procs([worker], timeout=5.0)
                for process in alive:
                    process.kill()
                assert not alive

    asyncio.run(scenario())


def test_fence_kills_a_stopped_worker_and_confirms_also_afterwards(site: Site) -> None:
    async def scenario() -> None:
        async with running_controller() as controller:
            with site.agent(controller.address):
                stream = await controller.attached()
                pid = await _serving(controller, stream, 0)
                os.kill(pid, signal.SIGSTOP)
                controller.fence(stream, 0)
                first = await controller.one(WorkerExited, 0)
                assert first.signal == signal.SIGKILL
                controller.fence(stream, 0)
                await controller.until(lambda: len(controller.all(WorkerExited, 0)) == 2)
                assert controller.all(WorkerExited, 0)[1] == first
                controller.fence(stream, 77)
                assert (await controller.one(WorkerExited, 77)).signal == signal.SIGKILL

    asyncio.run(scenario())


def test_messages_reach_the_worker_in_order_also_those_sent_before_it_connected(site: Site) -> None:
    settings = WorkerSettings(worker=WorkerId(0), node=NodeId("n0"), token="t", run_dir=str(site.folder))
    slow = Injection(action="slow", worker=WorkerId(0), factor=2.0)
    later = Injection(action="kill", worker=WorkerId(0), step=Step(9))
    stop = StopRequested(reason="enough")

    async def scenario() -> None:
        async with running_controller() as controller:
            with site.agent(controller.address):
                stream = await controller.attached()
                controller.start_worker(stream, 0)
                for command in (settings, slow, later):
                    controller.tell(stream, 0, command)
                await controller.until(lambda: len(controller.all(UserLine, 0)) == 3)
                controller.tell(stream, 0, stop)
                exited = await controller.one(WorkerExited, 0)
                assert (exited.exit_code, exited.signal) == (0, 0)
                told = [line.text for line in controller.all(UserLine, 0)]
                assert told == [repr(command) for command in (settings, slow, later, stop)]

    asyncio.run(scenario())


def test_injections_at_once_are_signals_of_the_agent(site: Site) -> None:
    async def scenario() -> None:
        async with running_controller() as controller:
            with site.agent(controller.address):
                stream = await controller.attached()
                await _serving(controller, stream, 0)
                await _serving(controller, stream, 1)
                controller.tell(stream, 0, Injection(action="kill", worker=WorkerId(0)))
                controller.tell(stream, 1, Injection(action="stop", worker=WorkerId(1)))
                assert (await controller.one(WorkerExited, 0)).signal == signal.SIGKILL
                assert (await controller.one(WorkerSuspected, 1)).cause == "stopped"

    asyncio.run(scenario())


def test_worker_that_breaks_the_protocol_is_killed_with_a_reason(site: Site) -> None:
    controller, _ = run_script(site, str(WORKER), "garbage")
    assert controller.all(WorkerExited)[0].signal == signal.SIGKILL
    assert controller.all(WorkerFailed)[0].kind == "bug"


def test_error_of_the_runtime_in_the_links_thread_ends_the_worker_with_a_reason(site: Site) -> None:
    async def scenario() -> None:
        async with running_controller() as controller:
            with site.agent(controller.address, str(WORKER), "refuse-delivery"):
                stream = await controller.attached()
                controller.start_worker(stream, 0)
                controller.tell(stream, 0, StopRequested(reason="this is what it cannot take"))
                assert (await controller.one(WorkerExited, 0)).exit_code == 1
                (failed,) = controller.all(WorkerFailed)
                assert failed.kind == "bug"
                assert "the runtime cannot take this" in failed.traceback

    asyncio.run(scenario())


def test_idle_worker_is_not_watched_for_progress(site: Site) -> None:
    """The worker shows no phase, so its silence means nothing; its stop still does."""

    async def scenario() -> None:
        async with running_controller() as controller:
            with site.agent(controller.address, str(WORKER), "wait"):
                stream = await controller.attached()
                controller.start_worker(stream, 0)
                pid = (await controller.one(WorkerStarted, 0)).pid
                os.kill(pid, signal.SIGSTOP)
                assert (await controller.one(WorkerSuspected, 0)).cause == "stopped"

    asyncio.run(scenario())


def test_hang_is_suspected_and_a_long_operation_is_not(site: Site) -> None:
    async def scenario() -> None:
        async with running_controller() as controller:
            with site.agent(controller.address, str(WORKER), "hang"):
                stream = await controller.attached()
                for worker in (1, 0):
                    controller.start_worker(stream, worker)
                suspected = await controller.one(WorkerSuspected, 0, limit_s=8.0)
                assert suspected.cause == "no-progress"
                assert 5.0 <= suspected.noticed_at - suspected.last_alive_at < 6.0
                assert (suspected.progress.step, suspected.progress.phase) == (3, "backward")
                assert not controller.all(WorkerSuspected, 1)

    asyncio.run(scenario())


@pytest.mark.parametrize("connects", [True, False])
def test_worker_that_never_reads_is_killed_before_it_fills_the_agents_memory(site: Site, connects: bool) -> None:
    async def scenario() -> None:
        async with running_controller() as controller:
            with site.agent(controller.address, str(WORKER), "serve" if connects else "wait") as agent:
                stream = await controller.attached()
                controller.start_worker(stream, 0)
                if connects:
                    await controller.one(WorkerReady, 0)
                    os.kill((await controller.one(WorkerStarted, 0)).pid, signal.SIGSTOP)
                bulk = WorkerSettings(worker=WorkerId(0), node=NodeId("n0"), token="t", run_dir="x" * 60_000)
                for _ in range(1200):
                    controller.tell(stream, 0, bulk)
                assert (await controller.one(WorkerExited, 0)).signal == signal.SIGKILL
                assert "bytes of messages unread" in agent.log.read_text()

    asyncio.run(scenario())


def test_process_that_the_agent_did_not_start_is_refused(site: Site) -> None:
    async def scenario() -> None:
        async with running_controller() as controller:
            with site.agent(controller.address):
                stream = await controller.attached()
                await _serving(controller, stream, 0)
                for hello in (encode_hello(Role.LINK, WorkerId(0)), encode_hello(Role.REPORT, WorkerId(9)), b"x" * 99):
                    with socket.socket(socket.AF_UNIX) as stranger:
                        stranger.settimeout(5.0)
                        stranger.connect(str(site.folder / "n0.agent"))
                        stranger.sendall(hello)
                        with suppress(ConnectionResetError):
                            assert await asyncio.to_thread(stranger.recv, 1) == b""
                controller.tell(stream, 0, StopRequested(reason="the true one goes on"))
                assert (await controller.one(WorkerExited, 0)).exit_code == 0

    asyncio.run(scenario())


def test_starts_leave_no_descriptor_behind(site: Site) -> None:
    async def scenario() -> None:
        async with running_controller() as controller:
            with site.agent(controller.address, str(WORKER), "last-words", "1") as agent:
                stream = await controller.attached()
                watched = psutil.Process(agent.pid)

                async def run(worker: int) -> int:
                    controller.start_worker(stream, worker)
                    await controller.one(WorkerExited, worker)
                    return watched.num_fds()

                before = await run(0)
                assert [await run(worker) for worker in range(1, 9)][-1] == before

    asyncio.run(scenario())


def test_worker_dies_with_a_killed_agent(site: Site) -> None:
    async def scenario() -> None:
        async with running_controller() as controller:
            with site.agent(controller.address) as agent:
                stream = await controller.attached()
                pids = [await _serving(controller, stream, worker) for worker in (0, 1)]
                os.kill(pids[1], signal.SIGSTOP)
                with watching(pids) as wait:
                    agent.send(signal.SIGKILL)
                    assert await asyncio.to_thread(wait, 5.0) == []
                await controller.until(lambda: stream.ended)
                assert not stream.left

    asyncio.run(scenario())
