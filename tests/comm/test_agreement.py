"""What ranks agree on after an edit, and what is handed over to whom: by the links of the tree alone."""

import random
from collections import Counter
from collections.abc import Generator

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from elaswave.comm.collectives.agreement import Agreement, Standing, agree, hand_over
from elaswave.comm.collectives.commands import NO_ANSWER, Command, Receive, Send
from elaswave.comm.collectives.tree import parent_of

LAST = 7
KEPT = bytes(range(1, 6))


def run_all(ranks: list[Generator[Command, Tensor, None]], generator: random.Random) -> Counter[tuple[int, int]]:
    """Drive all ranks in any order; returns the frames between each two of them."""
    frames: dict[tuple[int, int], list[Tensor]] = {}
    sent: Counter[tuple[int, int]] = Counter()
    waiting: dict[int, Command | None] = dict.fromkeys(range(len(ranks)))
    while waiting:
        ready = [
            rank
            for rank, command in waiting.items()
            if not isinstance(command, Receive) or frames.get((command.rank, rank))
        ]
        assert ready, f"all wait: {waiting}"
        rank = generator.choice(ready)
        command = waiting[rank]
        answer = frames[command.rank, rank].pop(0) if isinstance(command, Receive) else NO_ANSWER
        try:
            following = waiting[rank] = ranks[rank].send(answer)
        except StopIteration:
            del waiting[rank]
            continue
        if isinstance(following, Send):
            frames.setdefault((rank, following.rank), []).append(following.tensor.clone())
            sent[rank, following.rank] += 1
    assert not any(frames.values()), "frames that nobody takes"
    return sent


@given(
    st.lists(st.sampled_from(["missed", "held", "completed"]), min_size=1, max_size=40),
    st.integers(0, 2**32),
)
def test_the_last_result_reaches_whoever_misses_it_along_the_tree(states: list[str], seed: int) -> None:
    size = len(states)
    has = [rank for rank, state in enumerate(states) if state == "completed"]
    missed = [rank for rank, state in enumerate(states) if state == "missed"]
    agreed: dict[int, Agreement] = {}
    results = {rank: torch.zeros(len(KEPT), dtype=torch.uint8) for rank in range(size)}
    for rank in has:
        results[rank].copy_(torch.tensor(list(KEPT)))

    def take_part(rank: int) -> Generator[Command, Tensor, None]:
        mine = Standing(
            completed=LAST - (rank not in has),
            holder=rank,
            kept_bytes=len(KEPT) if rank in has else 3,
            reachable=LAST - (rank in missed),
            stake=rank,
        )
        agreed[rank] = yield from agree(rank, size, mine)
        if has and agreed[rank].whole.missing(agreed[rank].whole.completed):
            yield from hand_over(rank, agreed[rank], results[rank])

    sent = run_all([take_part(rank) for rank in range(size)], random.Random(seed))
    whole = agreed[0].whole
    assert all(found.whole == whole for found in agreed.values())
    assert (whole.completed, whole.holder, whole.stake) == (LAST - (not has), has[0] if has else 0, size - 1)
    assert whole.kept_bytes == (len(KEPT) if has else 3)
    assert whole.missing(LAST) == len(missed)
    assert all(parent_of(max(pair)) == min(pair) for pair in sent), "not a link of the tree"
    if has:
        assert all(bytes(results[rank].tolist()) == KEPT for rank in missed)
    above = ways_to_root(missed + has[:1]) if has and missed else set()
    extra = [pair for pair, count in sent.items() if count > 1]
    assert {rank for pair in extra for rank in pair} <= above, "handed to who is not on the way to anybody"


def ways_to_root(ranks: list[int]) -> set[int]:
    """These ranks and all above them."""
    found: set[int] = set()
    for start in ranks:
        rank = start
        while rank and rank not in found:
            found.add(rank)
            rank = parent_of(rank)
        found.add(rank)
    return found
