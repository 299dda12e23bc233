"""When a living worker is suspected: the pure decision, with made-up clocks."""

import random

from hypothesis import given
from hypothesis import strategies as st

from elaswave.progress import SignsOfLife
from elaswave_agent.watch import (
    Clear,
    GapHistogram,
    Memory,
    Sample,
    Suspect,
    Verdict,
    WatchLimits,
    look,
    silence_limit_s,
)

LIMITS = WatchLimits()
SWEEP_S = 0.25


class Watch:
    """Sweeps over one worker, four times a second."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now
        self.alive_at = now
        self.memory = Memory()
        self.cpu_s = 0.0
        self.verdicts: list[tuple[float, Verdict]] = []

    def sweep(
        self,
        *,
        alive: bool = True,
        state: str = "running",
        stepping: bool = True,
        until: float = 0.0,
        after: float = SWEEP_S,
        cpu_share: float = 1.0,
    ) -> Verdict:
        self.now += after
        self.cpu_s += after * cpu_share
        if alive:
            self.alive_at = self.now - 0.01
        signs = SignsOfLife(last_alive_at=self.alive_at, declared_until=until, stepping=stepping)
        self.memory, verdict = look(
            self.memory, Sample(now=self.now, state=state, signs=signs, cpu_s=self.cpu_s), LIMITS
        )
        if verdict is not None:
            self.verdicts.append((self.now, verdict))
        return verdict

    def sweeps(self, seconds: float, **how: object) -> list[Verdict]:
        found = [self.sweep(**how) for _ in range(round(seconds / SWEEP_S))]  # type: ignore[arg-type]
        return [verdict for verdict in found if verdict is not None]


def causes(verdicts: list[Verdict]) -> list[str]:
    return [verdict.cause if isinstance(verdict, Suspect) else "cleared" for verdict in verdicts if verdict is not None]


def test_steady_worker_is_never_suspected() -> None:
    assert Watch().sweeps(600) == []


def test_silence_is_suspected_after_five_seconds_once_and_cleared_by_a_sign() -> None:
    watch = Watch()
    watch.sweeps(10)
    began = watch.now
    assert causes(watch.sweeps(20, alive=False)) == ["no-progress"]
    assert 4.9 < watch.verdicts[0][0] - began < 5.6
    verdict = watch.sweep()
    assert isinstance(verdict, Clear)
    assert "no-progress" in verdict.evidence
    assert watch.sweeps(10) == []


def test_silence_before_the_first_step_and_after_the_last_means_nothing() -> None:
    watch = Watch()
    assert watch.sweeps(100, alive=False, stepping=False) == []
    watch.sweeps(10)
    assert watch.sweeps(100, alive=False, stepping=False) == []
    assert watch.sweeps(4, alive=False) == [], "silence counts from when stepping began"


def test_long_operation_is_excused_until_its_limit_and_silence_counts_from_there() -> None:
    watch = Watch()
    watch.sweeps(10)
    until = watch.now + 60.0
    assert watch.sweeps(60, alive=False, until=until) == []
    assert causes(watch.sweeps(10, alive=False, until=until)) == ["no-progress"]
    assert until + 5.0 < watch.verdicts[0][0] < until + 5.6


def test_what_a_long_operation_took_is_not_learned() -> None:
    watch = Watch()
    for _ in range(5):
        watch.sweeps(2)
        watch.sweeps(30, alive=False, until=watch.now + 60)
    watch.sweeps(2)
    assert silence_limit_s(watch.memory.gaps, LIMITS) == 5.0


def test_slow_workers_get_four_times_their_usual_gap() -> None:
    watch = Watch()
    for _ in range(20):
        assert watch.sweeps(3.0, alive=False) == []
        watch.sweep()
    limit = silence_limit_s(watch.memory.gaps, LIMITS)
    assert 4 * 3.0 < limit < 4 * 3.0 * 1.4
    assert causes(watch.sweeps(limit - 0.5, alive=False)) == []
    assert causes(watch.sweeps(1.0, alive=False)) == ["no-progress"]


def test_a_hang_is_not_learned_as_usual() -> None:
    watch = Watch()
    watch.sweeps(10)
    watch.sweeps(50, alive=False)
    watch.sweeps(10)
    assert silence_limit_s(watch.memory.gaps, LIMITS) == 5.0


def test_stop_is_suspected_at_the_first_look_and_cleared_when_it_goes_on() -> None:
    watch = Watch()
    watch.sweeps(10)
    assert causes([watch.sweep(state="stopped", alive=False)]) == ["stopped"]
    assert watch.sweeps(60, state="stopped", alive=False) == []
    # At the first look after it no sign of life has come yet.
    assert causes([watch.sweep(state="sleeping", alive=False)]) == ["cleared"]
    assert watch.sweeps(10) == []
    assert silence_limit_s(watch.memory.gaps, LIMITS) == 5.0


def test_stop_is_seen_also_outside_steps() -> None:
    assert causes([Watch().sweep(state="stopped", alive=False, stepping=False)]) == ["stopped"]


def test_profiler_that_halts_the_process_for_a_moment_is_no_stop() -> None:
    watch = Watch()
    assert watch.sweeps(10) == []
    for _ in range(10):
        assert watch.sweep(state="tracing-stop") is None
        assert watch.sweep() is None
    assert causes(watch.sweeps(0.5, state="tracing-stop", alive=False)) == ["stopped"]


def test_a_worker_that_gets_no_cpu_is_not_silent() -> None:
    watch = Watch()
    watch.sweeps(1.0)
    assert causes(watch.sweeps(60.0, alive=False, cpu_share=0.05)) == []
    assert causes(watch.sweeps(60.0, alive=False, cpu_share=0.5)) == ["no-progress"]


def test_a_profiler_that_halts_a_worker_at_every_look_is_no_stop() -> None:
    watch = Watch()
    watch.sweeps(1.0)
    assert causes(watch.sweeps(2.0, state="tracing-stop", alive=True)) == []


def test_disk_sleep_counts_when_it_lasts_without_a_sign_of_life() -> None:
    watch = Watch()
    for _ in range(10):
        watch.sweeps(1.0, state="disk-sleep")
        watch.sweep()
    assert watch.verdicts == []
    assert watch.sweeps(30, state="disk-sleep") == [], "it shows signs of life in between"
    watch.sweep()
    assert causes(watch.sweeps(6, state="disk-sleep", alive=False, stepping=False)) == ["disk-sleep"]


def test_disk_sleep_inside_a_long_operation_is_excused() -> None:
    watch = Watch()
    assert watch.sweeps(30, state="disk-sleep", alive=False, until=watch.now + 100) == []


def test_zombie_without_an_exit_is_suspected_after_a_second() -> None:
    watch = Watch()
    assert watch.sweeps(1.0, state="zombie", alive=False) == []
    assert causes(watch.sweeps(0.5, state="zombie", alive=False)) == ["zombie"]


def test_nobody_is_suspected_when_the_agent_itself_was_held_up() -> None:
    watch = Watch()
    watch.sweeps(10)
    assert watch.sweep(alive=False, after=60.0) is None
    assert watch.sweep() is None
    assert silence_limit_s(watch.memory.gaps, LIMITS) == 5.0
    assert causes(watch.sweeps(6, alive=False)) == ["no-progress"]


@given(st.lists(st.floats(0.0, 2000.0), min_size=1, max_size=200), st.floats(0.01, 0.999))
def test_quantile_is_at_least_the_exact_one_and_at_most_a_quarter_octave_more(gaps: list[float], share: float) -> None:
    histogram = GapHistogram()
    for gap in gaps:
        histogram = histogram.with_gap(gap)
    ordered = sorted(gaps)
    left = len(gaps) - share * len(gaps)
    exact = next(gap for above, gap in enumerate(reversed(ordered), 1) if above > left or above == len(gaps))
    found = histogram.quantile(share)
    largest_edge = 0.001 * 2 ** (79 / 4)
    assert found >= min(exact, largest_edge) * 0.999999
    assert found <= max(exact * 2**0.25 * 1.000001, 0.001)


def test_verdicts_alternate_whatever_is_seen() -> None:
    for seed in range(50):
        source = random.Random(seed)
        watch = Watch()
        for _ in range(500):
            watch.sweep(
                alive=source.random() < 0.1,
                state=source.choice(["running", "sleeping", "stopped", "disk-sleep", "tracing-stop", "zombie"]),
                stepping=source.random() < 0.9,
                after=source.choice([0.25, 0.25, 0.3, 2.0]),
            )
        kinds = [type(verdict) for _, verdict in watch.verdicts]
        assert kinds == [Suspect, Clear] * (len(kinds) // 2) + [Suspect] * (len(kinds) % 2), f"seed {seed}"
        assert kinds
