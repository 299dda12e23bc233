"""The flags of elaswave-launch: a stable surface, frozen in flags.txt."""

from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from elaswave.errors import ConfigError
from elaswave_launch.flags import OUR_FLAGS, TORCHRUN_FLAGS, Flag, Kind, Support, build_parser, notes, parse
from elaswave_launch.operator import operate
from elaswave_launch.options import Devices, LaunchOptions, read_options

GOLDEN = Path(__file__).with_name("flags.txt")
DEVICES = Devices(cpus=4, gpus=0)


def surface() -> str:
    """One line a flag: spellings, kind, default, variable, what is done with it."""
    lines = []
    for flag in (*TORCHRUN_FLAGS, *OUR_FLAGS):
        names = " ".join(flag.spellings)
        lines.append(
            f"{names} | {flag.kind.value} | {flag.default or '-'} | {flag.variable or '-'} | {flag.support.value}"
        )
    return "\n".join(lines) + "\n"


def options(*arguments: str, environment: dict[str, str] | None = None) -> LaunchOptions:
    return read_options(parse(arguments, environment or {}), DEVICES)


def test_the_surface_is_the_golden_one() -> None:
    assert surface() == GOLDEN.read_text(), f"if the change is meant, write it to {GOLDEN.name} and docs/launch.md"


def test_every_flag_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "launch.md").read_text()
    missing = [flag.name for flag in (*TORCHRUN_FLAGS, *OUR_FLAGS) if f"`{flag.name}`" not in text]
    assert not missing


def test_every_flag_of_torchrun_is_known() -> None:
    ours = {spelling for flag in TORCHRUN_FLAGS for spelling in flag.spellings}
    theirs = {spelling for action in get_args_parser()._actions for spelling in action.option_strings}
    assert theirs - ours - {"-h", "--help"} == set()


def test_both_spellings_and_attached_values_mean_the_same() -> None:
    wanted = options("--nproc-per-node", "4", "--max-restarts", "2", "train.py")
    for arguments in (
        ("--nproc_per_node", "4", "--max_restarts", "2", "train.py"),
        ("--nproc_per_node=4", "--max-restarts=2", "train.py"),
        ("--max-restarts=2", "--nproc-per-node=4", "--", "train.py"),
    ):
        assert options(*arguments) == wanted


def test_pet_variables_stand_in_for_flags_and_flags_win() -> None:
    environment = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "3", "PET_STANDALONE": "1", "PET_LOG_DIR": ""}
    assert options("train.py", environment=environment).config.started_workers == 6
    assert options("--nnodes", "1", "train.py", environment=environment).config.started_workers == 3
    with pytest.raises(ConfigError, match="PET_STANDALONE=yes: must be 0 or 1"):
        options("train.py", environment={"PET_STANDALONE": "yes"})


def test_arguments_of_the_script_are_its_own() -> None:
    found = options("--dp", "1", "train.py", "--dp", "9", "--unknown", "-m", "--", "x")
    assert found.script == "train.py"
    assert found.script_args == ("--dp", "9", "--unknown", "-m", "--", "x")
    assert not found.module
    found = options("-m", "pkg.train", "--lr", "1")
    assert (found.module, found.script, found.script_args) == (True, "pkg.train", ("--lr", "1"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nproc", "4", "train.py"], "unknown flag --nproc: did you mean"),
        (["--nprocs-per-node", "4", "train.py"], "unknown flag --nprocs-per-node: did you mean --nproc-per-node?"),
        (["--zzz", "train.py"], "unknown flag --zzz: see elaswave-launch --help"),
        (["--dp=4", "--foo=bar", "train.py"], "unknown flag --foo"),
        (["-x", "train.py"], "unknown flag -x"),
        (["--dp"], "argument --dp: expected one argument"),
        ([], "the following arguments are required: SCRIPT"),
        (["--standalone=1", "train.py"], "ignored explicit argument '1'"),
    ],
)
def test_unknown_flags_are_named(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        options(*arguments)
    assert message in str(refused.value)


@pytest.mark.parametrize("flag", [flag for flag in TORCHRUN_FLAGS if flag.support is Support.REFUSED])
def test_refused_flags_say_why(flag: Flag) -> None:
    value = [] if flag.kind is Kind.SWITCH else ["1"]
    for spelling in flag.spellings:
        with pytest.raises(ConfigError) as refused:
            options(spelling, *value, "train.py")
        assert str(refused.value) == f"{flag.name} is not supported: {flag.reason}"


def test_flags_that_do_nothing_are_noted_once_each() -> None:
    parsed = parse(
        ["--role", "a", "--tee=3", "-r", "0:1", "--rdzv_conf", "x=1", "train.py"], {"PET_MONITOR_INTERVAL": "1"}
    )
    noted = [note.split()[0] for note in notes(parsed)]
    assert sorted(noted) == ["--monitor-interval", "--rdzv-conf", "--redirects", "--role", "--tee"]
    assert notes(parse(["train.py"], {})) == notes(parse(["--nnodes", "2:2", "train.py"], {})) == []
    [note] = notes(parse(["--nnodes", "1:3", "train.py"], {}))
    assert note == "--nnodes 1:3: the job starts with 3 nodes and goes on with fewer"


def test_help_shows_every_flag_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        parse(["--help"], {})
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    assert all(flag.name in text for flag in (*TORCHRUN_FLAGS, *OUR_FLAGS))
    assert build_parser().allow_abbrev is False


# ------------------------------------------------------------------ what they mean


def test_dp_is_what_the_workers_allow() -> None:
    assert options("--nproc-per-node", "8", "--pp", "2", "train.py").config.dp == 4
    assert options("--nproc-per-node", "8", "--pp", "2", "--spares", "2", "train.py").config.dp == 3
    assert options("--nproc-per-node", "auto", "train.py").config.dp == 4
    assert options("--nproc-per-node", "cpu", "train.py").config.dp == 4


def test_standalone_nodes_are_local_agents_and_other_nodes_are_not() -> None:
    local = options("--standalone", "--nnodes", "4", "--nproc-per-node", "2", "train.py")
    assert (local.local_agents, local.first_node, local.host, local.port) == (4, 0, "127.0.0.1", 0)
    far = options("--nnodes", "4", "--node-rank", "2", "--rdzv-endpoint", "n0:77", "--rdzv-id", "x", "train.py")
    assert (far.local_agents, far.first_node, far.host, far.port) == (1, 2, "n0", 77)
    assert not far.starts_controller
    assert far.link_transport == "tcp"
    static = options("--nnodes=2", "--master_addr", "n0", "--rdzv-id", "x", "train.py")
    assert (static.host, static.port, static.starts_controller) == ("n0", 29500, True)
    ignored = options("--standalone", "--master-port", "1", "train.py")
    assert ignored.port == 0


def test_a_range_of_nodes_starts_with_the_most() -> None:
    assert options("--standalone", "--nnodes", "1:3", "train.py").config.nnodes == 3


def test_ours_reach_the_options() -> None:
    found = options(
        "--nproc-per-node", "6", "--dp", "2", "--pp", "2", "--spares", "2", "--replicas", "2", "--report", "r.json",
        "--inject", "kill:worker=1,step=2,phase=reduce", "--inject", "slow:worker=0,step=1,factor=3", "--save-every",
        "5", "--save-dir", "ckpt", "--fresh", "--unbuffered", "--log-cap", "64M", "--start", "spawn",
        "--link-transport", "tcp", "--node-suspect-s", "0.5", "--local-ranks-filter", "1,2", "train.py",
    )  # fmt: skip
    assert (found.config.dp, found.config.pp, found.config.spares, found.config.replicas) == (2, 2, 2, 2)
    assert found.config.want_report
    assert found.config.save_every == 5
    assert [injection.action for injection in found.injections] == ["kill", "slow"]
    assert found.injections[1].factor == 3.0
    assert (found.report, found.save_dir) == (Path.cwd() / "r.json", Path.cwd() / "ckpt")
    assert (found.fresh, found.unbuffered, found.log_cap_bytes, found.start) == (True, True, 64 << 20, "spawn")
    assert (found.link_transport, found.node_suspect_s, found.shown_ranks) == ("tcp", 0.5, {1, 2})


def test_the_example_of_several_machines_names_the_job(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"], {})
    example = capsys.readouterr().out.partition("two machines")[2].partition("with ELASWAVE_TLS")[0]
    assert "--rdzv-id" in example, "a job on several nodes is refused without a name"


def test_help_of_operator_commands_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        operate(["--help"], {})
    shown = capsys.readouterr().out
    assert all(f"\n  elaswave {command}" in shown for command in ("status", "inject", "stop"))
    assert "exit codes: 0 done" in shown
