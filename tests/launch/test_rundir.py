"""Run folders: found while their launcher lives, removed after it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from launch_harness import Place

from elaswave.errors import ConfigError
from elaswave_launch.rundir import RunningJob, base_folder, create_run_folder, running_jobs


def running(job: str) -> RunningJob:
    return RunningJob(job=job, address="127.0.0.1:1", pid=os.getpid(), token="secret")


@pytest.fixture
def base(place: Place) -> Path:
    return base_folder(place.environment)


def test_a_published_job_is_found_until_its_folder_is_removed(base: Path) -> None:
    folder = create_run_folder(base, "mine")
    assert running_jobs(base) == [], "not before it is published"
    folder.publish(running("mine"))
    assert running_jobs(base) == [running("mine")]
    folder.remove()
    assert running_jobs(base) == []
    assert not folder.path.exists()
    folder.remove()


def test_everything_in_it_is_for_this_user_only(base: Path) -> None:
    folder = create_run_folder(base, "mine")
    folder.publish(running("mine"))
    folder.write_token("secret")
    modes = {path.name: path.stat().st_mode & 0o777 for path in (base, folder.path, *folder.path.iterdir())}
    assert set(modes.values()) == {0o700, 0o600}
    assert (folder.path / "token").read_text() == "secret"
    folder.remove()


def test_two_jobs_of_one_name_are_refused_and_unnamed_ones_get_names(base: Path) -> None:
    folder = create_run_folder(base, "mine")
    with pytest.raises(ConfigError, match="--rdzv-id mine: a job of this name is running"):
        create_run_folder(base, "mine")
    others = [create_run_folder(base, "") for _ in range(3)]
    assert len({other.job for other in others}) == 3
    for each in (folder, *others):
        each.remove()


def test_nodes_of_one_job_on_one_machine_have_folders_of_their_own(base: Path) -> None:
    folders = [create_run_folder(base, "mine", node) for node in range(3)]
    assert len({folder.path for folder in folders}) == 3
    for folder in folders:
        folder.remove()


def test_long_names_get_short_folders(base: Path) -> None:
    first, second = create_run_folder(base, "a" * 63 + "1"), create_run_folder(base, "a" * 63 + "2")
    assert first.path != second.path
    assert len(first.path.name) <= 20
    first.publish(running(first.job))
    assert running_jobs(base) == [running("a" * 63 + "1")]
    first.remove()
    second.remove()


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"what": 1}', '{"tls": 3}'])
def test_a_damaged_state_file_is_named(base: Path, content: str) -> None:
    folder = create_run_folder(base, "damaged")
    (folder.path / "controller.json").write_text(content)
    with pytest.raises(ConfigError, match=r"controller\.json is not a state file of this version"):
        running_jobs(base)
    folder.remove()


def test_what_a_killed_launcher_left_is_removed_by_the_next_one(base: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path;"
        "from elaswave_launch.rundir import create_run_folder, RunningJob;"
        f"folder = create_run_folder(Path({str(base)!r}), 'killed');"
        "folder.publish(RunningJob(job='killed', address='x', pid=1, token='t'));"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == -9
    assert (base / "killed" / "controller.json").exists()
    assert running_jobs(base) == []
    folder = create_run_folder(base, "next")
    assert [path.name for path in base.iterdir()] == ["next"]
    folder.remove()


def test_a_folder_of_somebody_else_is_not_used(base: Path) -> None:
    base.mkdir(mode=0o777)
    base.chmod(0o777)
    with pytest.raises(ConfigError, match="only user"):
        create_run_folder(base, "mine")
    base.chmod(0o700)
    elsewhere = base.with_name("elsewhere")
    base.rename(elsewhere)
    base.symlink_to(elsewhere)
    with pytest.raises(ConfigError, match="only user"):
        create_run_folder(base, "mine")


def test_long_or_missing_roots_are_passed_over(tmp_path: Path) -> None:
    name = f"elaswave-{os.getuid()}"
    long = tmp_path / ("x" * 60)
    long.mkdir()
    assert base_folder({"XDG_RUNTIME_DIR": str(long), "TMPDIR": "/dev"}) == Path("/dev") / name
    assert base_folder({"XDG_RUNTIME_DIR": "/missing", "TMPDIR": str(long)}) == Path("/tmp") / name
    assert base_folder({}) == Path("/tmp") / name
