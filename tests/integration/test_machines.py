"""Jobs on two machines, as far as the network goes: everything between them is TLS, and the cable may be cut."""

import contextlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Ground, Job, assert_same_training
from tiny_job import TinyOptions

from elaswave.certificates import AUTHORITY_VARIABLE, CERTIFICATE_VARIABLE, KEY_VARIABLE, TlsFiles
from tests.comm.network_namespaces import Machine, two_machines
from tests.comm.tls_authority import Authority

HOSTS = ("10.203.78.1", "10.203.78.2")
PORT = 29500

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl command to make certificates with")


@pytest.fixture
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Machine, Machine]]:
    """With certificates for both."""
    show(monkeypatch, Authority(tmp_path, "ours").issue("both", hosts=HOSTS))
    with two_machines(HOSTS) as made:
        yield made


def show(monkeypatch: pytest.MonkeyPatch, files: TlsFiles) -> None:
    """Jobs that are started from now on have these."""
    monkeypatch.setenv(CERTIFICATE_VARIABLE, files.certificate)
    monkeypatch.setenv(KEY_VARIABLE, files.key)
    monkeypatch.setenv(AUTHORITY_VARIABLE, files.authority)


def start(ground: Ground, machine: Machine, options: TinyOptions, *flags: str) -> Job:
    """The same command on both, but for the rank."""
    token = ground.work / "token"
    token.write_text("t" * 32)
    common = ("--nnodes=2", "--nproc-per-node=2", "--dp=2", "--pp=2", "--rdzv-id=pair", f"--token-file={token}")
    where = (f"--rdzv-endpoint={HOSTS[0]}:{PORT}", f"--node-rank={HOSTS.index(machine.host)}")
    return ground.start([*common, *where, *flags], options.flags(), inside=machine.inside)


def test_a_job_on_two_machines_loses_a_worker(ground: Ground, machines: tuple[Machine, Machine]) -> None:
    options = TinyOptions()
    injection = "--inject=kill:worker=1,step=3,phase=backward"
    first, second = (start(ground, machine, options, injection) for machine in machines)
    ended = first.wait()
    assert_same_training(ended, options)
    assert second.wait().exit_code == 0
    assert [incident.workers for incident in ended.need_report().incidents] == [{1}]
    ground.check_nothing_left()


def test_a_machine_that_is_cut_off_is_lost_and_comes_back(ground: Ground, machines: tuple[Machine, Machine]) -> None:
    """Meanwhile the other goes on."""
    options = TinyOptions(steps=100)
    first, second = (start(ground, machine, options, "--node-suspect-s=1.5") for machine in machines)
    first.wait_line(rf"step \d+/{options.steps} ", count=2)
    status = ground.operate("status", "--json", inside=machines[0].inside)
    assert status.returncode == 0, status.stderr
    assert {worker["node"] for worker in json.loads(status.stdout)["workers"]} == {"node0", "node1"}
    # Else the steps that are left may be over before the other machine is back.
    slowed = ground.operate("inject", "slow", "--worker=0", "--factor=8", inside=machines[0].inside)
    assert slowed.returncode == 0, slowed.stderr
    machines[1].cut()
    first.wait_line("incident: node lost")
    first.wait_line(r"step .* 2 workers")
    machines[1].mend()
    first.wait_line("incident: join", count=2)
    ended = first.wait()
    assert_same_training(ended, options)
    assert ended.need_report().incidents[0].workers == {2, 3}
    assert second.wait().exit_code == 0, "it hears how the job has ended"
    ground.check_nothing_left()


def test_a_cut_shorter_than_the_patience_costs_nothing_but_time(
    ground: Ground, machines: tuple[Machine, Machine]
) -> None:
    options = TinyOptions(steps=40)
    first, second = (start(ground, machine, options, "--node-suspect-s=30") for machine in machines)
    first.wait_line(rf"step \d+/{options.steps} ")
    machines[1].cut()
    with contextlib.suppress(subprocess.TimeoutExpired):
        first.process.wait(2.0)
    assert first.process.poll() is None
    machines[1].mend()
    ended = first.wait()
    assert_same_training(ended, options)
    assert not ended.need_report().incidents
    assert second.wait().exit_code == 0


@pytest.mark.parametrize("more", [[], ["--unbuffered"]], ids=["buffered", "unbuffered"])
def test_links_that_break_between_living_workers_cost_no_bit(
    ground: Ground, machines: tuple[Machine, Machine], more: list[str]
) -> None:
    """Again and again, and one worker dies on the way; frames that were under way are lost each time."""
    options = TinyOptions(steps=40, dropout=0.1)
    flags = ("--inject=kill:worker=3,step=25", *more)
    first, second = (start(ground, machine, options, *flags) for machine in machines)
    broken = 0
    for round_number in range(10):
        first.wait_line(rf"step \d+/{options.steps} ", count=2 + round_number // 5)
        broken += machines[round_number % 2].reset_connections(machines[1 - round_number % 2], PORT)
    ended = first.wait()
    assert broken > 0, "nothing was broken"
    assert_same_training(ended, options)
    assert [incident.workers for incident in ended.need_report().incidents] == [{3}]
    assert second.wait().exit_code == 0


def test_a_machine_with_certificates_of_another_authority_ends_and_says_why(
    ground: Ground, machines: tuple[Machine, Machine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(ground, machines[0], TinyOptions())
    show(monkeypatch, Authority(tmp_path, "theirs").issue("stranger", hosts=HOSTS))
    ended = start(ground, machines[1], TinyOptions()).wait()
    assert ended.exit_code == 1
    assert "the controller's certificate will not do" in ended.err, ended.story()
