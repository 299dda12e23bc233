"""The benchmarks can be asked for help, and their statistics and tables are right. Nothing is timed here."""

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.append(str(FOLDER))

from common import (  # noqa: E402 - the folder of the scripts is on their path only
    Options,
    Row,
    Target,
    alternate,
    chance_limit,
    format_number,
    format_table,
    paired_ratios,
    quantile,
)
from instructions import (  # noqa: E402
    RECORD,
    Execution,
    Loss,
    Records,
    Samples,
    Work,
    fed_spans_of,
    longest_gap,
    undisturbed_gaps,
)
from rival_systems import disturbance_of  # noqa: E402
from run import NAMES  # noqa: E402

SCRIPTS = ("run", *NAMES)

FIGURES = st.lists(st.floats(min_value=-1e6, max_value=1e6), min_size=1, max_size=50)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_explains_itself(name: str) -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py"), "--help"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {"--quick", "--json"} <= set(done.stdout.replace("[", " ").replace("]", " ").split()), done.stdout


def test_run_names_all_scripts_and_refuses_others() -> None:
    helpers = {"common", "faults", "instructions", "launching", "rival_systems"}
    assert {path.stem for path in FOLDER.glob("*.py")} == {*SCRIPTS, *helpers}
    done = subprocess.run(
        [sys.executable, str(FOLDER / "run.py"), "--only", "links,nothing"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2 and "there is no nothing" in done.stderr
    assert all(name in done.stderr for name in SCRIPTS[1:])


# ------------------------------------------------------------------ statistics


@given(values=FIGURES, share=st.floats(min_value=0, max_value=1))
def test_quantile_is_the_least_value_that_enough_do_not_exceed(values: list[float], share: float) -> None:
    enough = share * len(values)
    right = [v for v in values if sum(other <= v for other in values) >= enough]
    assert quantile(values, share) == min(right)


def test_no_quantile_of_nothing() -> None:
    with pytest.raises(ValueError, match="no values"):
        quantile([], 0.5)


def test_chance_limit_is_that_of_the_binomial_distribution() -> None:
    # Three coins: P(at most 2 heads) = 7/8, P(at most 1) = 1/2.
    assert [chance_limit(3, 0.5, confidence) for confidence in (0.12, 0.5, 0.87, 0.9)] == [0, 1, 2, 3]
    assert chance_limit(60, 0.01) == 3
    assert chance_limit(0, 0.01) == 0


def test_ratios_are_formed_round_by_round() -> None:
    assert paired_ratios([2.0, 6.0], [1.0, 2.0]) == (2.0, 3.0)
    with pytest.raises(ValueError, match="3 figures cannot be paired with 2"):
        paired_ratios([1.0, 2.0, 3.0], [1.0, 2.0])


@given(systems=st.integers(1, 4), rounds=st.integers(1, 9))
def test_rounds_run_each_system_once_and_come_in_mirrored_pairs_that_begin_with_another(
    systems: int, rounds: int
) -> None:
    ran: list[str] = []

    def system(name: str) -> Callable[[], float]:
        def run() -> float:
            ran.append(name)
            return float(len(ran))

        return run

    names = [f"s{index}" for index in range(systems)]
    figures = alternate({name: system(name) for name in names}, rounds)
    orders = [tuple(ran[start : start + systems]) for start in range(0, len(ran), systems)]
    assert len(orders) == rounds and all(sorted(order) == names for order in orders)
    assert all(later == sooner[::-1] for sooner, later in zip(orders[::2], orders[1::2], strict=False))
    assert len({order[0] for order in orders[::2]}) == min(systems, len(orders[::2]))
    for number, order in enumerate(orders):
        assert [figures[name][number] for name in order] == sorted(figures[name][number] for name in order)


# ------------------------------------------------------------------ the table


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (12, "12"), (1234.5, "1234"), (56.78, "56.8"), (1.2345, "1.23"), (0.012345, "0.0123"), (-0.5, "-0.500")],
)
def test_numbers_have_three_digits(value: float, shown: str) -> None:
    assert format_number(value) == shown


@pytest.mark.parametrize(
    ("target", "verdict", "text"),
    [
        (Target(of="median", limit=2), "yes", "median <= 2"),
        (Target(of="median", limit=1.9), "NO", "median <= 1.9"),
        (Target(of="max", limit=8.9, goal=True), "NO", "goal max <= 8.9"),
        (Target(of="max", limit=9), "yes", "max <= 9"),
        (Target(of="min", limit=1, least=True), "yes", "min >= 1"),
        (Target(of="min", limit=1.1, least=True), "NO", "min >= 1.1"),
    ],
)
def test_targets_look_at_what_they_name(target: Target, verdict: str, text: str) -> None:
    row = Row(what="step", unit="ms", figures=[9.0, 1.0, 2.0], target=target)
    assert (row.verdict, str(target)) == (verdict, text)
    assert row.cells() == ("step", "3", "2", "1", "9", "ms", text, verdict, "")
    assert row.values()["met"] is (verdict == "yes")


def test_a_row_that_was_not_measured_says_so() -> None:
    row = Row(what="step", unit="ms", target=Target(of="max", limit=1), note="not measured: no time")
    assert row.cells() == ("step", "0", "-", "-", "-", "ms", "max <= 1", "-", "not measured: no time")
    assert row.values()["met"] is None and row.values()["median"] is None


def test_the_table_is_aligned_and_leaves_empty_columns_out() -> None:
    rows = [Row(what="a", unit="ms", figures=[1.0, 2.0, 300.0]), Row(what="longer", unit="x", figures=[0.5])]
    assert format_table(rows).split("\n") == [
        "what    n  median    min    max  unit",
        "a       3       2      1    300  ms",
        "longer  1   0.500  0.500  0.500  x",
    ]


def test_figures_go_to_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "figures.json"
    options = Options(name="example", quick=True, json=path, seed=3)
    options.finish([Row(what="a", unit="ms", figures=[1.5])], ["a note"])
    assert '"figures": [\n    1.5\n   ]' in path.read_text() and '"a note"' in path.read_text()
    assert "load average" in capsys.readouterr().out


# ------------------------------------------------------------------ what a loss changed


def run_of(worker: int, work: tuple[int, int], begun: float, ended: float | None, layer: int = 0) -> Execution:
    step, micro_batch = work
    done = Work(step=step, micro_batch=micro_batch, layer=layer, backward=False)
    return Execution(worker=worker, work=done, begun=begun, ended=ended)


def undisturbed_step(step: int, at: float) -> list[Execution]:
    """Two stages (layers 0 and 1) of two workers, four micro-batches: workers 0 and 2 run layer 0."""
    found = []
    for micro_batch in range(4):
        pipeline, turn = micro_batch % 2, micro_batch // 2
        for layer in range(2):
            begun = at + turn + layer
            found.append(run_of(2 * pipeline + layer, (step, micro_batch), begun, begun + 0.9, layer))
    return found


def killed_at_worker_0() -> list[Execution]:
    """Worker 0 dies at 20.5 in its first piece of step 2; worker 2 takes its two pieces over, from 22.5 on."""
    return [
        *undisturbed_step(0, 0.0),
        *undisturbed_step(1, 10.0),
        run_of(0, (2, 0), 20.0, None),
        run_of(2, (2, 1), 20.0, 20.9),
        run_of(2, (2, 3), 21.0, 21.9),
        run_of(3, (2, 1), 21.0, 21.9, 1),
        run_of(3, (2, 3), 24.0, 24.9, 1),
        run_of(2, (2, 0), 22.5, 23.4),
        run_of(2, (2, 2), 23.5, 24.4),
        run_of(1, (2, 0), 23.5, 24.4, 1),
        run_of(1, (2, 2), 24.5, 25.4, 1),
    ]


def test_a_loss_is_read_from_the_records() -> None:
    facts = Loss(killed_at_worker_0(), victim=0, at=20.5).facts()
    assert facts is not None
    assert facts.resume_s == 2.0
    assert (facts.dead, facts.redone, facts.redone_of_others) == (1, 1, 0)
    # Worker 1 shares pipelines with the dead one and worker 2 took over: only 3 is left. Its gap is within step 2.
    assert facts.longest_gaps == {3: pytest.approx(24.0 - 21.9)}


def test_work_of_survivors_that_is_done_again_is_found() -> None:
    extra = [run_of(2, (2, 3), 25.0, 25.9), run_of(2, (2, 0), 26.0, 26.9)]
    facts = Loss([*killed_at_worker_0(), *extra], victim=0, at=20.5).facts()
    assert facts is not None
    assert (facts.dead, facts.redone, facts.redone_of_others) == (1, 1, 2)


def test_a_loss_after_unlike_steps_is_not_judged() -> None:
    unlike = [one for one in killed_at_worker_0() if one.work.step != 1 or one.work.micro_batch != 2]
    assert Loss(unlike, victim=0, at=20.5).facts() is None
    assert Loss(killed_at_worker_0(), victim=9, at=20.5).facts() is None


def test_gaps_are_those_that_touch_the_window() -> None:
    spans = [(0.0, 1.0, 1), (1.5, 2.0, 1), (5.0, 6.0, 1), (6.25, 7.0, 1), (90.0, 91.0, 2)]
    # The gap begins inside no instruction, but before its end.
    assert longest_gap(spans, 1.6, 1.9) == pytest.approx(3.0)
    assert longest_gap(spans, 0.0, 1.2) == 0.5
    assert longest_gap(spans, 3.0, 4.0) == 3.0
    assert longest_gap(spans, 5.5, 6.5) == 0.25
    assert longest_gap(spans, 8.0, 9.0) == 0.0, "the wait for the end of a step is no gap"
    assert undisturbed_gaps(spans[:4], 10.0, 5, random.Random(1)) == []
    found = undisturbed_gaps(spans[:4], 0.5, 200, random.Random(1))
    assert len(found) == 200 and set(found) <= {0.0, 0.25, 0.5, 3.0} and 3.0 in found


def test_a_worker_is_held_only_while_its_input_is_there() -> None:
    def ran(worker: int, layer: int, backward: bool, begun: float, ended: float) -> Execution:
        work = Work(step=1, micro_batch=0, layer=layer, backward=backward)
        return Execution(worker=worker, work=work, begun=begun, ended=ended)

    executions = [
        ran(0, 0, False, 0.0, 1.0),
        ran(1, 1, False, 2.0, 3.0),  # its input was there at 1.0, but nothing of this worker came before
        ran(1, 1, True, 3.5, 4.0),
        ran(0, 0, True, 6.0, 7.0),  # its input was there at 4.0: waited for from 1.0 on, held from 4.0 on
    ]
    assert fed_spans_of(executions, 0) == [(0.0, 4.0, 1), (6.0, 7.0, 1)]
    assert fed_spans_of(executions, 1) == [(2.0, 3.0, 1), (3.5, 4.0, 1)]


def test_records_are_read_back_up_to_a_torn_one(tmp_path: Path) -> None:
    places = Samples(steps=3, micro_batches=2).places(range(1, 9))
    assert sorted(places.values()) == [(1, 0), (1, 1), (2, 0), (2, 1)]
    sample = {place: number for number, place in places.items()}
    begun, ended, torn = np.array(
        [(1.0, sample[2, 1], 5, 1, 0), (1.5, sample[2, 1], 5, 1, 1), (2.0, sample[1, 0], 4, 0, 0)], dtype=RECORD
    )
    (tmp_path / f"7-{os.getpid()}.records").write_bytes(begun.tobytes() + ended.tobytes() + torn.tobytes()[:-1])
    (tmp_path / "8-1.records").write_bytes(torn.tobytes())
    work = Work(step=2, micro_batch=1, layer=5, backward=True)
    assert Records(tmp_path).executions(places) == [
        Execution(worker=7, work=work, begun=1.0, ended=1.5),
        Execution(worker=8, work=Work(step=1, micro_batch=0, layer=4, backward=False), begun=2.0, ended=None),
    ]


def test_delays_of_rivals() -> None:
    steady = [(float(number), number) for number in range(6)]
    # Killed at 5.2: step 6 comes after 3 s, and after going back to step 4 the job passes step 5 at 10.
    found = disturbance_of([*steady, (8.0, 4), (9.0, 5), (10.0, 6), (11.0, 7)], 5.2, 12.0, lost_steps=2)
    assert (found.normal_s, found.stall_s, found.behind_s, found.lost_steps) == (1.0, 2.0, 4.0, 2)
