"""Faults on purpose strike in the middle of a worker's own work, whatever it takes over on the way."""

from executed_system import FaultPlace, walk_executed

from elaswave.core.config import ControllerConfig
from elaswave.core.ids import Step, WorkerId
from elaswave.core.injection import Injection
from elaswave.core.shape import CHUNK_ELEMENTS
from elaswave.runtime.faults import FaultInjector
from elaswave.sim.system import Harm, SystemScene

DEAD, DEATH_STEP = 1, 3


def test_hops_taken_over_do_not_move_the_middle() -> None:
    config = ControllerConfig(dp=4, pp=1, nproc_per_node=4, replicas=1, shard_elements=CHUNK_ELEMENTS)
    scene = SystemScene(config=config, harm=Harm(), layers=2, micro_batches=8, steps=6)
    taken_over = 0
    for seed in range(6):
        places = walk_executed(scene, seed, {DEAD: DEATH_STEP}, unbuffered=False).fault_places
        taken_over += sum(place.recovery for place in places)
        own = [place for place in places if not place.recovery and place.worker != DEAD]
        for place in own:
            same = [other for other in own if _same_phase(other, place)]
            assert place.expected == len(same), f"seed {seed}: {place}"
    assert taken_over


def _same_phase(one: FaultPlace, other: FaultPlace) -> bool:
    return (one.worker, one.step, one.phase) == (other.worker, other.step, other.phase)


def test_repair_does_not_count_as_own_work() -> None:
    faults = FaultInjector(before_death=lambda: None)
    faults.add(Injection(action="slow", worker=WorkerId(0), step=Step(0), phase="backward", factor=3.0))
    for recovery in (True, True, True, False, False):
        assert faults.slow_factor == 1.0
        faults.at(Step(0), "backward", expected=4, recovery=recovery)
    assert faults.slow_factor == 1.0
    faults.at(Step(0), "backward", expected=4)
    assert faults.slow_factor == 3.0


def test_a_fault_during_recovery_strikes_at_the_first_pass_of_repair() -> None:
    faults = FaultInjector(before_death=lambda: None)
    injection = Injection(action="slow", worker=WorkerId(0), step=Step(2), factor=2.0, during_recovery=True)
    faults.add(injection)
    faults.at(Step(2), "forward", expected=1)
    assert faults.slow_factor == 1.0
    faults.at(Step(2), "forward", expected=1, recovery=True)
    assert faults.slow_factor == 2.0
