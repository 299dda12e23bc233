"""The GPT example: its text, its errors, and that it trains."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics_harness import ROOT, in_fresh_process

from elaswave.errors import ConfigError
from elaswave.runtime.reference import ReferenceLayout, train_reference

SCRIPT = ROOT / "examples" / "pretrain_gpt.py"
SMALL = ["--layers", "2", "--hidden", "16", "--heads", "2", "--seq", "16", "--global-batch", "8", "--steps", "3"]


def load() -> ModuleType:
    specification = importlib.util.spec_from_file_location("pretrain_gpt", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["pretrain_gpt"] = module
    specification.loader.exec_module(module)
    return module


gpt = load()


@given(st.lists(st.binary(max_size=20), min_size=1, max_size=6), st.data())
def test_text_is_the_files_one_after_the_other(
    tmp_path_factory: pytest.TempPathFactory, contents: list[bytes], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("text")
    files = []
    for index, content in enumerate(contents):
        files.append(folder / f"{index}.txt")
        files[-1].write_bytes(content)
    whole = b"".join(contents)
    text = gpt.Text(files)
    assert text.size == len(whole)
    if whole:
        start = data.draw(st.integers(0, len(whole) - 1))
        stop = data.draw(st.integers(start + 1, len(whole)))
        assert bytes(text.read(start, stop).tolist()) == whole[start:stop]


def test_samples_are_windows_and_targets_are_shifted_by_one(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(bytes(range(26)))
    windows = gpt.Windows(gpt.open_text(str(tmp_path / "text")), 5)
    assert len(windows) == 5
    last_input, last_target = windows[4]
    assert (last_input.tolist(), last_target.tolist()) == ([20, 21, 22, 23, 24], [21, 22, 23, 24, 25])
    assert last_input.dtype == torch.int64
    assert len(gpt.Windows(gpt.Text([]), 5)) == 0


def test_the_default_text_is_real_bounded_and_opened_lazily() -> None:
    text = gpt.open_text(None)
    assert 100_000 < text.size <= gpt.DEFAULT_TEXT_BYTES
    assert not text._opened
    assert b"import" in bytes(text.read(0, 50_000).tolist())


def test_a_folder_is_all_its_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two").write_bytes(b"two")
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "empty").write_bytes(b"")
    text = gpt.open_text(str(tmp_path))
    assert bytes(text.read(0, text.size).tolist()) == b"onetwo"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "{tmp}/missing"], "--data {tmp}/missing: No such file or directory"),
        (["--data", "{tmp}/empty"], "--data {tmp}/empty: there is no text in it"),
        (["--data", "{tmp}"], "--data {tmp}: there is no text in it"),
        (
            ["--data", "{tmp}/short"],
            "--data {tmp}/short: 40 bytes make 2 samples of --seq 16, fewer than --global-batch 8",
        ),
        (["--layers", "0"], "--layers 0: must be at least 1"),
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--hidden", "30", "--heads", "4"], "--hidden 30 is not divisible by --heads 4"),
        (["--dropout", "1"], "--dropout 1.0: must be from 0 to below 1"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--global-batch", "7"], "Job.global_batch 7 is not divisible by micro_batch 2"),
        (["--lr", "-1"], "AdamW.lr is -1.0"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_are_told_in_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "empty").write_bytes(b"")
    if arguments[1:] == ["{tmp}/short"]:
        (tmp_path / "short").write_bytes(b"x" * 40)
    given_arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    with pytest.raises(ConfigError) as caught:
        gpt.make_job(gpt.parse([*SMALL, *given_arguments]))
    assert message.format(tmp=tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_it_learns_and_its_layout_does_not_show() -> None:
    job = gpt.make_job(gpt.parse([*SMALL, "--tie-embeddings", "--steps", "12", "--lr", "0.01"]))
    result = train_reference(job)
    assert result.losses[0] == pytest.approx(5.545, abs=0.2)
    assert result.losses[-1] < result.losses[0] - 0.5
    assert train_reference(job, ReferenceLayout(cuts=(1, 3), replicas=3, shards=2)) == result


def test_flags_reach_the_job() -> None:
    job = gpt.make_job(gpt.parse([*SMALL, "--dtype", "bfloat16", "--recompute"]))
    assert (job.recompute, job.parameter_dtype, job.accumulation, job.clip_norm) == (True, "bfloat16", "exact64", 1.0)
    other = gpt.make_job(gpt.parse([*SMALL, "--clip-norm", "0", "--accumulation", "float32"]))
    assert (other.recompute, other.parameter_dtype, other.accumulation, other.clip_norm) == (
        False, "float32", "float32", None
    )  # fmt: skip
    for found in (job, other):
        assert train_reference(found).losses[0] == pytest.approx(5.545, abs=0.2)


def test_as_a_script_it_trains_alone_with_the_same_digest() -> None:
    code = f"import runpy, sys; sys.argv = ['gpt', *{SMALL!r}]; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    output = in_fresh_process(code).splitlines()
    result = train_reference(gpt.make_job(gpt.parse(SMALL)))
    assert [line.split()[1] for line in output[:3]] == ["1/3", "2/3", "3/3"]
    assert output[-1] == f"digest {result.digest}"
