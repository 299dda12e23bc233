"""Whether a living worker is to be suspected: a pure function of what was seen of it and when.

A worker is suspected when its process is stopped, when it sleeps in the kernel or hangs as a zombie for long, or when
it shows no sign of life for longer than its own past makes likely. A worker that waits for others shows signs of life
(elaswave.progress), so only an instruction that does not end is taken for a hang. Nothing is decided about the time
before the first step, after the last one, or inside an announced long operation.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Final

from elaswave.progress import SignsOfLife

STOPPED: Final = "stopped"
ZOMBIE: Final = "zombie"
DISK_SLEEP: Final = "disk-sleep"
NO_PROGRESS: Final = "no-progress"

KILLED: Final = "killed"
"""The kernel is ending it (elaswave.process_stat)."""

# Process states by the names of psutil.
_STATE_STOPPED = "stopped"
_STATE_TRACED = "tracing-stop"
_STATE_ZOMBIE = "zombie"
_STATE_DISK_SLEEP = "disk-sleep"

_BINS_PER_OCTAVE = 4
_FIRST_EDGE_S = 0.001
_BINS = 80  # up to 0.001 s x 2^20 = 1048 s


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchLimits:
    """When to suspect; seconds."""

    silence_floor_s: float = 5.0
    """Least silence that counts as a hang, however steady the worker was."""

    silence_factor: float = 4.0
    """Silence counts as a hang from this many times the learned p99.9 of gaps between signs of life."""

    disk_sleep_s: float = 5.0
    """Uninterruptible sleep in every sweep for this long; also how a frozen cgroup looks."""

    zombie_s: float = 1.0
    """A zombie whose pidfd has not fired: its main thread is gone, others run on."""

    late_sweep_s: float = 1.0
    """A sweep later than this after the one before: the agent itself did not run, so silence is counted afresh."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One look at a worker. `state`: of its process, by psutil's names; `now`: CLOCK_MONOTONIC seconds; `cpu_s`: CPU
    time that it has used."""

    now: float
    state: str
    signs: SignsOfLife
    cpu_s: float


@dataclass(frozen=True, slots=True)
class GapHistogram:
    """Gaps between signs of life, in quarter octaves from 1 ms to 17 minutes; of bounded size."""

    counts: tuple[int, ...] = (0,) * _BINS

    def with_gap(self, gap_s: float) -> "GapHistogram":
        """One more gap."""
        index = _bin(gap_s)
        return GapHistogram((*self.counts[:index], self.counts[index] + 1, *self.counts[index + 1 :]))

    def quantile(self, share: float) -> float:
        """Upper edge in seconds of the bin that holds this quantile; 0 where nothing was learned.

        Below 1 / (1 - share) gaps it is the largest gap: a limit derived from it is careful at first.
        """
        total = sum(self.counts)
        if total == 0:
            return 0.0
        left = total - share * total
        above = 0
        for index in range(_BINS - 1, -1, -1):
            above += self.counts[index]
            if above > left or above == total:
                return _upper_edge(index)
        return 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What has to be remembered of a worker between two looks. Start with `Memory()`.

    silent_since: when the silence that is being measured began. learnable: the gap under way is one of ordinary work.
    in_state_since: when `state` was seen first, without another state in between.
    """

    sampled_at: float | None = None
    last_alive_at: float = 0.0
    silent_since: float = 0.0
    learnable: bool = False
    cpu_s: float = 0.0
    state: str = ""
    in_state_since: float = 0.0
    looks_in_state: int = 0
    suspected: str | None = None
    gaps: GapHistogram = field(default_factory=GapHistogram)


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspect:
    """The worker is to be suspected. cause: as in WorkerSuspected."""

    cause: str
    evidence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Clear:
    """The suspicion is over."""

    evidence: str


Verdict = Suspect | Clear | None


def look(memory: Memory, sample: Sample, limits: WatchLimits) -> tuple[Memory, Verdict]:
    """Take in one look at a worker; at most one verdict, and only when the answer changes."""
    seen = _follow_silence(_follow_state(memory, sample, limits), memory, sample)
    found = _find_cause(seen, sample, limits)
    if found is not None and memory.suspected is None:
        return replace(seen, suspected=found.cause), found
    if found is None and memory.suspected is not None:
        quiet = max(sample.now - seen.last_alive_at, 0.0)
        evidence = f"process state {sample.state!r}, last sign of life {quiet:.2f} s ago (was: {memory.suspected})"
        return replace(seen, suspected=None), Clear(evidence=evidence)
    return seen, None


def silence_limit_s(gaps: GapHistogram, limits: WatchLimits) -> float:
    """Silence in seconds from which a stepping worker counts as hanging."""
    return max(limits.silence_floor_s, limits.silence_factor * gaps.quantile(0.999))


def _follow_state(memory: Memory, sample: Sample, limits: WatchLimits) -> Memory:
    """Count how long the process has been in its state; start anew where nobody looked for a while."""
    late = memory.sampled_at is not None and sample.now - memory.sampled_at > limits.late_sweep_s
    if late:
        memory = replace(memory, silent_since=sample.now, learnable=False)
    if late or memory.state != sample.state:
        resumed = memory.state in (_STATE_STOPPED, _STATE_TRACED)
        # A process that was just continued has had no time yet to show that it lives.
        silent_since = sample.now if resumed else memory.silent_since
        return replace(
            memory, state=sample.state, in_state_since=sample.now, looks_in_state=1, silent_since=silent_since
        )
    return replace(memory, looks_in_state=memory.looks_in_state + 1)


def _follow_silence(seen: Memory, before: Memory, sample: Sample) -> Memory:
    """Measure the silence under way, and learn the gap that has just ended if it was one of ordinary work."""
    signs, now = sample.signs, sample.now
    moved = signs.last_alive_at > before.last_alive_at
    gaps, silent_since, learnable = seen.gaps, seen.silent_since + _starved_s(before, sample), seen.learnable
    if moved:
        if learnable:
            gaps = gaps.with_gap(signs.last_alive_at - before.last_alive_at)
        silent_since, learnable = max(silent_since, signs.last_alive_at), True
    excused = not signs.stepping or signs.declared_until > now
    if excused:
        silent_since = now
    elif signs.declared_until > 0:
        silent_since = max(silent_since, signs.declared_until)
    # Gaps of a stop, of a suspicion or of an announced operation say nothing about ordinary work.
    at_fault = before.suspected is not None or sample.state in (_STATE_STOPPED, _STATE_TRACED)
    return replace(
        seen,
        sampled_at=now,
        cpu_s=sample.cpu_s,
        last_alive_at=max(before.last_alive_at, signs.last_alive_at),
        silent_since=silent_since,
        learnable=learnable and not excused and not at_fault,
        gaps=gaps,
    )


def _starved_s(before: Memory, sample: Sample) -> float:
    """Seconds since the last look in which a runnable process got no CPU: these are the machine's, not its silence."""
    if sample.state != "running" or before.state != "running" or before.sampled_at is None:
        return 0.0
    return max(0.0, sample.now - before.sampled_at - (sample.cpu_s - before.cpu_s))


def _find_cause(seen: Memory, sample: Sample, limits: WatchLimits) -> Suspect | None:
    """The reason to suspect now, if there is one; states of the process come before silence."""
    in_state_s = sample.now - seen.in_state_since
    match sample.state:
        case _ if sample.state == _STATE_STOPPED:
            return Suspect(cause=STOPPED, evidence="process state T (stopped)")
        case "tracing-stop" if seen.looks_in_state > 1 and _is_silent(seen, sample):
            # Looks may catch a profiler that halts the process for moments: then it shows signs of life in between.
            return Suspect(cause=STOPPED, evidence=f"process state t (traced) for {in_state_s:.2f} s")
        case "zombie" if in_state_s >= limits.zombie_s:
            return Suspect(cause=ZOMBIE, evidence=f"process state Z (zombie) for {in_state_s:.1f} s")
        case "disk-sleep" if in_state_s >= limits.disk_sleep_s and _is_silent(seen, sample):
            return Suspect(cause=DISK_SLEEP, evidence=f"process state D (disk sleep or frozen) for {in_state_s:.1f} s")
        case _:
            pass
    silence = sample.now - seen.silent_since
    limit = silence_limit_s(seen.gaps, limits)
    if sample.signs.stepping and silence > limit:
        return Suspect(cause=NO_PROGRESS, evidence=f"no sign of life for {silence:.1f} s, limit {limit:.1f} s")
    return None


def _is_silent(seen: Memory, sample: Sample) -> bool:
    """No sign of life since the process fell asleep, and none was to be expected less."""
    signs = sample.signs
    return signs.last_alive_at <= seen.in_state_since and signs.declared_until <= sample.now


def _bin(gap_s: float) -> int:
    if gap_s <= _FIRST_EDGE_S:
        return 0
    return min(math.ceil(_BINS_PER_OCTAVE * math.log2(gap_s / _FIRST_EDGE_S)), _BINS - 1)


def _upper_edge(index: int) -> float:
    return float(_FIRST_EDGE_S * 2.0 ** (index / _BINS_PER_OCTAVE))
