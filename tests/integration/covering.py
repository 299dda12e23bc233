"""Running one scenario and judging it; shared by the covering set and by scripts/soak.py."""

from harness import Ended, Ground, assert_same_training
from scenario import STEP, Scenario

_STRICT_PHASES = ("forward", "backward")


def check_scenario(ground: Ground, scenario: Scenario) -> Ended:
    """Run it. Fails unless it ends with the bits of the undisturbed run, and with the incidents that were caused."""
    ended = ground.run(scenario.flags(), scenario.script_flags())
    assert_same_training(ended, scenario.job)
    check_incidents(ended, scenario)
    return ended


def check_incidents(ended: Ended, scenario: Scenario) -> None:
    """Each expected incident is there once, no other one is, and none made others' work be done again."""
    report = ended.need_report()
    seen = sorted((found.cause, sorted(found.workers)) for found in report.incidents)
    expected = sorted((wanted.cause, sorted(wanted.workers)) for wanted in scenario.expected())
    assert seen == expected, ended.story()
    for found in report.incidents:
        assert found.redone_hops <= found.dead_hops <= found.step_hops, report.text
        if found.cause in ("killed", "stopped") and scenario.kind not in ("in-recovery", "last-worker"):
            assert (found.step, found.phase) == (STEP, scenario.phase), report.text
