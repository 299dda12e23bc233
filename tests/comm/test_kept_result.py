"""Results that are kept: whole whatever was received of them, and not changed with the user's tensors."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from elaswave.comm.collectives.commands import Placed
from elaswave.comm.kept_result import KeptResult


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=6), st.data())
def test_what_is_kept_is_the_result(parts: list[tuple[int, bool]], data: st.DataObject) -> None:
    """Twice, with the same memory: parts of the given lengths, some of which were received."""
    kept = KeptResult()
    for turn in range(2):
        result = torch.randn(sum(length for length, _ in parts))
        views = result.split([length for length, _ in parts]) if parts else ()
        placed = [
            Placed(view, view.clone()) for view, (_, was_received) in zip(views, parts, strict=True) if was_received
        ]
        placed.append(Placed(torch.zeros(3), torch.ones(3)))  # of something else
        shuffled = data.draw(st.permutations(placed))
        kept.replace(result, shuffled)
        expected = result.clone().view(torch.uint8)
        result.fill_(turn)
        assert kept.nbytes == expected.numel()
        assert torch.equal(kept.whole(), expected)
    kept.replace(None, [])
    assert kept.nbytes == 0 and kept.whole().numel() == 0


def test_received_memory_is_not_copied() -> None:
    kept, result, received = KeptResult(), torch.ones(8), torch.ones(8)
    kept.replace(result, [Placed(result, received)])
    received.fill_(2.0)
    assert torch.equal(kept.whole().view(torch.float32), received)


def test_what_was_received_for_another_place_is_not_kept_for_the_result() -> None:
    kept, result = KeptResult(), torch.ones(8)
    kept.replace(result, [Placed(torch.zeros(8), torch.zeros(8))])
    assert torch.equal(kept.whole().view(torch.float32), result)
