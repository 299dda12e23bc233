"""Faults asked for on purpose: `kill|stop|slow:worker=W,step=K,phase=PH[,factor=F][,during=recovery]`."""

import math
from dataclasses import dataclass

from elaswave.core.ids import Step, WorkerId
from elaswave.errors import ConfigError

ACTIONS = ("kill", "stop", "slow")
PHASES = ("forward", "backward", "reduce", "decide", "update", "publish", "any")
DEFAULT_FACTOR = 2.0
_MAX_WORKER = 2**32 - 1
_MAX_STEP = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Injection:
    """One fault. `step` None: at once. `factor` is how many times longer a slow worker takes (above 1), else 0.

    `during_recovery`: at the first repair hop of that step instead of the program's own work.
    """

    action: str
    worker: WorkerId
    step: Step | None = None
    phase: str = "any"
    factor: float = 0.0
    during_recovery: bool = False


def parse_injection(spec: str) -> Injection:
    """Read a SPEC. Raises ConfigError that names the part that is wrong and what would be right."""
    action, colon, rest = spec.partition(":")
    if action not in ACTIONS or not colon:
        raise _wrong(spec, f"must start with {', '.join(name + ':' for name in ACTIONS)}")
    fields: dict[str, str] = {}
    for part in rest.split(","):
        key, equals, value = part.partition("=")
        if key not in ("worker", "step", "phase", "factor", "during") or not equals:
            raise _wrong(spec, f"{part!r} is not worker=W, step=K, phase=PH, factor=F or during=recovery")
        if key in fields:
            raise _wrong(spec, f"{key} is given twice")
        fields[key] = value
    for key in ("worker", "step"):
        if key not in fields:
            raise _wrong(spec, f"{key}=… is missing")
    phase = fields.get("phase", "any")
    if phase not in PHASES:
        raise _wrong(spec, f"phase={phase} must be one of {', '.join(PHASES)}")
    if fields.get("during", "recovery") != "recovery":
        raise _wrong(spec, f"during={fields['during']} must be during=recovery")
    return Injection(
        action=action,
        worker=WorkerId(_natural(spec, "worker", fields["worker"], _MAX_WORKER)),
        step=Step(_natural(spec, "step", fields["step"], _MAX_STEP)),
        phase=phase,
        factor=_factor(spec, action, fields.get("factor")),
        during_recovery="during" in fields,
    )


def check_factor(value: float) -> float:
    """`value`, if a worker can be slowed by it. Raises ConfigError."""
    if not (math.isfinite(value) and value > 1.0):
        raise ConfigError(f"factor {value}: must be a number above 1")
    return value


def _factor(spec: str, action: str, text: str | None) -> float:
    if action != "slow":
        if text is not None:
            raise _wrong(spec, "factor goes with slow only")
        return 0.0
    if text is None:
        return DEFAULT_FACTOR
    try:
        return check_factor(float(text))
    except (ValueError, ConfigError) as error:
        raise _wrong(spec, f"factor={text} must be a number above 1") from error


def _natural(spec: str, key: str, text: str, limit: int) -> int:
    # int() alone would take "1_0", " 7" and digits of other scripts, and raises its own error for thousands of digits.
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(limit)) and int(text) <= limit):
        raise _wrong(spec, f"{key}={text} must be a whole number from 0 to {limit}")
    return int(text)


def _wrong(spec: str, problem: str) -> ConfigError:
    return ConfigError(f"--inject {spec}: {problem}")
