"""Who runs callbacks: the state never goes to a worker that has none while somebody has it."""

import random

from hypothesis import given
from hypothesis import strategies as st

from elaswave.core.ids import NodeId, WorkerId
from elaswave.core.plan import Member
from elaswave.core.planner.callers import choose_callers


def member(worker: int, node: int) -> Member:
    return Member(worker=WorkerId(worker), node=NodeId(f"n{node}"), local_index=0, incarnation=0)


members = st.dictionaries(st.integers(0, 7), st.integers(0, 2), min_size=1).map(
    lambda nodes: [member(worker, node) for worker, node in nodes.items()]
)


@given(st.lists(members, min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_the_state_stays_where_it_is(history: list[list[Member]], chance: random.Random) -> None:
    callers: tuple[WorkerId, ...] = ()
    for present in history:
        before, callers = callers, choose_callers(callers, present)
        shuffled = list(present)
        chance.shuffle(shuffled)
        assert choose_callers(before, shuffled) == callers
        nodes = {found.worker: found.node for found in present}
        there = [worker for worker in before if worker in nodes]
        assert callers[0] == (there[0] if there else min(nodes))
        if len(nodes) == 1:
            assert len(callers) == 1
            continue
        caller, keeper = callers
        assert keeper in nodes
        assert keeper != caller
        assert nodes[keeper] != nodes[caller] or set(nodes.values()) == {nodes[caller]}
        if there[1:] and nodes[there[1]] != nodes[caller]:
            assert keeper == there[1], "a copy moved although it was well placed"
