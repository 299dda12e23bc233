"""What a run of the covering set does, as flags, and what its report has to say. Values only."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

from tiny_job import TinyOptions

LAYOUTS = {"4x1": (4, 1), "1x4": (1, 4), "2x2": (2, 2), "4x2": (4, 2), "3x3": (3, 3)}
"""Replicas x stages, as --dp and --pp."""

PHASES = ("forward", "backward", "reduce", "decide", "update", "publish")
KINDS = (
    "none", "kill", "two-stages", "in-recovery", "stop", "two-in-stage", "node", "last-worker", "spare", "restart",
)  # fmt: skip
OFF_ON = ("off", "on")
FACTORS: Mapping[str, tuple[str, ...]] = {
    "layout": tuple(LAYOUTS),
    "kind": KINDS,
    "phase": PHASES,
    "dropout": OFF_ON,
    "tied": OFF_ON,
    "recompute": OFF_ON,
    "bf16": OFF_ON,
    "unbuffered": OFF_ON,
    "capped": OFF_ON,
    "tcp": OFF_ON,
}
SOAK_FEATURES = ("ring",)
"""On or off in runs of scripts/soak.py; tests/integration/test_ring_jobs.py has a few of them."""

STEP = 3
"""At which faults strike, counted from 0."""

STEPS = 8
RESTART_STEPS = 60
"""Steps enough for a worker to start again and to take part."""

LOG_CAP_BYTES = 2048
"""Less than the boundary values of one step of one worker."""

_NO_PHASE = ("none", "node")


def allowed(row: Mapping[str, str]) -> bool:
    """Whether these values go together; a row may lack factors."""
    kind, phase = row.get("kind"), row.get("phase")
    dp, pp = LAYOUTS[row["layout"]] if "layout" in row else (4, 2)
    if kind in _NO_PHASE and phase not in (None, PHASES[0]):
        return False
    if kind == "in-recovery" and phase not in (None, "forward", "backward"):
        return False  # later in a step a death leaves nobody any hops to run again
    if kind in ("two-stages", "last-worker") and pp == 1:
        return False
    return not (kind == "two-in-stage" and dp == 1)


def allowed_in_pairs(row: Mapping[str, str]) -> bool:
    """As `allowed`, with all phases for a single kill only: for others the phase follows from the rest, by turns.

    Otherwise the pairs of failures and phases alone would make a dozen runs more.
    """
    layout, kind, phase = row.get("layout"), row.get("kind"), row.get("phase")
    if not allowed(row):
        return False
    if layout is None or kind is None or phase is None or kind in ("kill", *_NO_PHASE):
        return True
    turn = tuple(LAYOUTS).index(layout) + KINDS.index(kind)
    possible = [found for found in PHASES if allowed({"kind": kind, "phase": found})]
    return phase == possible[turn % len(possible)]


def full_product() -> list[Mapping[str, str]]:
    """Every row that is allowed."""
    rows = (dict(zip(FACTORS, values, strict=True)) for values in product(*FACTORS.values()))
    return [row for row in rows if allowed(row)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """An incident that the report must hold. `cause` and ids of the workers that it concerns."""

    cause: str
    workers: frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One run: a layout, what fails and how the job is."""

    layout: str
    kind: str
    phase: str
    features: frozenset[str]
    """Names of the factors that are on."""

    @classmethod
    def of(cls, row: Mapping[str, str]) -> "Scenario":
        """The run of a row of the covering set."""
        on = frozenset(name for name, value in row.items() if value == "on")
        return cls(layout=row["layout"], kind=row["kind"], phase=row["phase"], features=on)

    @property
    def name(self) -> str:
        """For people and for pytest -k."""
        failure = self.kind if self.kind in _NO_PHASE else f"{self.kind}-{self.phase}"
        return "-".join([self.layout, failure, *(name for name in (*FACTORS, *SOAK_FEATURES) if name in self.features)])

    @property
    def job(self) -> TinyOptions:
        """The job, which alone decides the digest."""
        return TinyOptions(
            dropout=0.1 if "dropout" in self.features else 0.0,
            tied=int("tied" in self.features),
            recompute=int("recompute" in self.features),
            dtype="bfloat16" if "bf16" in self.features else "float32",
            clip=0.5 if "tied" in self.features else 0.0,
            steps=RESTART_STEPS if self.kind == "restart" else STEPS,
        )

    def victims(self) -> list[int]:
        """Workers that die or stop, in that order."""
        dp, pp = LAYOUTS[self.layout]
        stage = PHASES.index(self.phase) % pp
        match self.kind:
            case "none" | "node":
                return []
            case "two-stages":
                return [worker_at(0, stage, pp), worker_at(dp - 1, (stage + 1) % pp, pp)]
            case "in-recovery" if dp == 1:
                return [stage, (stage + 1) % pp]
            case "in-recovery" | "two-in-stage":
                return [worker_at(dp - 1, stage, pp), worker_at(0, stage, pp)]
            case "last-worker":
                return [worker_at(replica, stage, pp) for replica in range(dp)]
            case _:
                return [(5 * PHASES.index(self.phase) + 1) % (dp * pp)]

    def flags(self) -> list[str]:
        """Flags of elaswave-launch, without the script."""
        dp, pp = LAYOUTS[self.layout]
        nodes = self._nodes()
        spares = int(self.kind == "spare")
        flags = ["--standalone", f"--nnodes={nodes}", f"--nproc-per-node={dp * pp // nodes + spares}"]
        flags += [f"--dp={dp}", f"--pp={pp}", f"--spares={spares}", f"--replicas={self._replicas()}"]
        flags += [f"--max-restarts={int(self.kind == 'restart')}"]
        flags += ["--unbuffered"] if "unbuffered" in self.features else []
        flags += [f"--log-cap={LOG_CAP_BYTES}"] if "capped" in self.features else []
        flags += ["--link-transport=tcp"] if "tcp" in self.features else []
        flags += ["--reduce=ring"] if "ring" in self.features else []
        return flags + [f"--inject={spec}" for spec in self._injections()]

    def script_flags(self) -> list[str]:
        """Flags of the script."""
        flags = self.job.flags()
        if self.kind == "node":
            # A worker runs several blocks for at least one micro-batch in every step: this is about half of the job.
            flags += [f"--kill-node=node{self._nodes() - 1}", "--after-forwards=13"]
        return flags

    def expected(self) -> list[Expected]:
        """All incidents, in any order."""
        dp, pp = LAYOUTS[self.layout]
        if self.kind == "node":
            per_node = dp * pp // self._nodes()
            return [Expected(cause="node lost", workers=frozenset(range(dp * pp - per_node, dp * pp)))]
        cause = "stopped" if self.kind == "stop" else "killed"
        found = [Expected(cause=cause, workers=frozenset((victim,))) for victim in self.victims()]
        if self.kind in ("spare", "restart"):
            found.append(Expected(cause="join", workers=frozenset((dp * pp,))))
        return found

    def _nodes(self) -> int:
        if self.kind != "node":
            return 1
        dp, pp = LAYOUTS[self.layout]
        return dp if pp > 1 and dp > 1 else 2

    def _replicas(self) -> int:
        # As many as workers die: what is lost with all copies of a shard is another test's subject.
        return max(1, len(self.victims()))

    def _injections(self) -> list[str]:
        action = "stop" if self.kind == "stop" else "kill"
        specs = []
        for index, victim in enumerate(self.victims()):
            step = STEP - 1 + index if self.kind == "last-worker" else STEP
            during = self.kind == "in-recovery" and index > 0
            phase = "any,during=recovery" if during else self.phase
            specs.append(f"{action}:worker={victim},step={step},phase={phase}")
        return specs


def worker_at(replica: int, stage: int, pp: int) -> int:
    """Worker ids go through a pipeline, then on to the next one."""
    return replica * pp + stage
