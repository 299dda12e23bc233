"""Flags of the agent."""

import subprocess
import sys
from pathlib import Path

import pytest
from agent_harness import LIMIT_S, python_environment

from elaswave.errors import ConfigError
from elaswave.process_start import Program
from elaswave_agent.options import parse_options

NEEDED = ("--controller", "127.0.0.1:1", "--node", "n0", "--workers", "2", "--spawn", "--run-dir", "/run")


def test_everything_after_the_first_dashes_is_the_scripts() -> None:
    options = parse_options([*NEEDED, "--module", "--", "pkg.train", "--node", "x", "--", "-y"])
    assert options.program == Program(target="pkg.train", arguments=("--node", "x", "--", "-y"), is_module=True)
    assert options.node == "n0"


def test_logs_are_in_the_run_folder_unless_said_otherwise() -> None:
    assert parse_options([*NEEDED, "--", "s"]).node_log_dir == Path("/run/logs/run/n0")
    options = parse_options([*NEEDED, "--log-dir", "/logs", "--run-id", "j", "--", "s"])
    assert options.node_log_dir == Path("/logs/j/n0")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (NEEDED, "no script"),
        ((*NEEDED, "--"), "no script"),
        ((*NEEDED, "--workers", "0", "--", "s"), "--workers 0: must be at least 1"),
        ((*NEEDED, "--node", "a/b", "--", "s"), "--node 'a/b'"),
        ((*NEEDED, "--node", "..", "--", "s"), "--node '..'"),
        ((*NEEDED, "--run-dir", "/" + "r" * 100, "--", "s"), "shorter --run-dir"),
    ],
)
def test_wrong_values_are_named(flags: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_options(flags)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--token-file", "/nowhere/token"), "--token-file /nowhere/token"),
        (("--log-dir", "/proc/logs"), "--log-dir /proc/logs"),
        (("--run-dir", "/proc/run"), "agent socket /proc/run/n0.agent"),
    ],
)
def test_what_the_machine_refuses_ends_the_agent_with_one_line(
    flags: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    command = ["-m", "elaswave_agent", *NEEDED, "--log-dir", str(tmp_path), *flags, "--", "s"]
    done = subprocess.run(
        [sys.executable, *command],
        env=python_environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 93
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_agent_imports_neither_torch_nor_the_runtime() -> None:
    code = "import sys, elaswave_agent.__main__; print([m for m in sys.modules if m in ('torch', 'elaswave.runtime')])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=python_environment(),
        check=True,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.stdout == "[]\n"
