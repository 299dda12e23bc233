"""Which nodes a restart of the whole job waits for."""

from dataclasses import replace

import pytest

from elaswave.core.config import ControllerConfig
from elaswave_controller.restart import Restart

CONFIG = ControllerConfig(dp=2, pp=2, nnodes=3, nproc_per_node=2, spares=2)


def test_lost_nodes_are_waited_for_where_somebody_may_start_them_again() -> None:
    restart = Restart(CONFIG, "saved/step_3")
    assert restart.lack(0) == ""
    assert restart.next_config(1).nnodes == 3


@pytest.mark.parametrize("workers", range(7))
def test_elsewhere_the_nodes_that_are_left_have_to_do(workers: int) -> None:
    restart = Restart(replace(CONFIG, nodes_return=False), "saved/step_3")
    lack = restart.lack(workers)
    assert bool(lack) == (workers < CONFIG.layout_workers)
    assert not lack or (f"have {workers} of the 4 workers" in lack and "saved/step_3" in lack)
    assert restart.next_config(2).nnodes == 2
