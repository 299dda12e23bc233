"""The progress page: what the writer shows is what the reader sees, also across a death or a tear."""

import mmap
import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elaswave.core.events import Progress
from elaswave.core.ids import Step
from elaswave.errors import InvariantError, ProtocolError
from elaswave.progress import MAX_MICRO_BATCHES, PAGE_BYTES, PHASES, ProgressReader, ProgressWriter

STEPS = st.integers(0, 6)
HOPS = st.tuples(st.just("hop"), STEPS, st.integers(0, MAX_MICRO_BATCHES + 5), st.booleans(), st.booleans())
BEGINS = st.tuples(st.just("begin"), STEPS, st.sampled_from(PHASES), st.none(), st.none())


def pair() -> tuple[ProgressReader, ProgressWriter]:
    reader = ProgressReader.create()
    return reader, ProgressWriter.open(reader.descriptor)


def test_fresh_page_is_empty_and_alive() -> None:
    before = time.monotonic()
    reader, writer = pair()
    progress, alive_at = reader.read()
    assert progress == Progress()
    assert before <= alive_at <= time.monotonic()
    assert not reader.signs().stepping
    writer.close()
    reader.close()


@given(st.lists(HOPS | BEGINS, max_size=40))
def test_reader_sees_the_step_begun_last_with_its_hops(calls: list[tuple[str, int, object, bool, bool]]) -> None:
    """Oracle: sets of hops for each step, the two newest of each parity kept."""
    reader, writer = pair()
    hops: dict[int, set[tuple[int, bool, bool]]] = {}
    newest = {0: -1, 1: -1}
    step, phase = 0, ""
    for name, at, what, backward, done in calls:
        if at > newest[at % 2]:
            newest[at % 2] = at
            hops[at] = set()
        if name == "begin":
            writer.begin(Step(at), str(what))
            step, phase = at, str(what)
        else:
            assert isinstance(what, int)
            writer.hop(Step(at), what, backward, done)
            if at == newest[at % 2] and what < MAX_MICRO_BATCHES:
                hops[at].add((what, backward, done))
    found, _ = reader.read()
    marked = hops.get(step, set()) if newest[step % 2] == step else set()

    def mask(backward: bool, done: bool) -> int:
        return sum(1 << number for number, one, other in marked if (one, other) == (backward, done))

    assert found == Progress(
        step=Step(step),
        phase=phase,
        instructions=len(calls),
        forward_begun=mask(False, False),
        forward_done=mask(False, True),
        backward_begun=mask(True, False),
        backward_done=mask(True, True),
    )
    writer.close()
    reader.close()


def test_page_survives_its_writer() -> None:
    reader = ProgressReader.create()
    pid = os.fork()
    if pid == 0:
        writer = ProgressWriter.open(reader.descriptor)
        writer.begin(Step(4), "backward")
        writer.hop(Step(4), 70, backward=True, done=False)
        os._exit(0)
    os.waitpid(pid, 0)
    progress, _ = reader.read()
    assert (progress.step, progress.phase, progress.backward_begun) == (4, "backward", 1 << 70)
    reader.close()


def test_masks_of_a_step_being_cleared_are_empty() -> None:
    reader, writer = pair()
    writer.begin(Step(2), "forward")
    writer.hop(Step(2), 1, backward=False, done=True)
    # As a writer killed between taking the stamp away and giving the new one.
    writer._words[6] = 0
    assert reader.read()[0].forward_done == 0
    writer.begin(Step(2), "forward")
    assert reader.read()[0].forward_done == 0
    writer.close()
    reader.close()


def test_alive_is_a_sign_of_life_and_no_progress() -> None:
    reader, writer = pair()
    writer.begin(Step(1), "reduce")
    first, at = reader.read()
    writer.alive()
    second, later = reader.read()
    assert second == first
    assert later > at
    writer.close()
    reader.close()


def test_long_operations_nest_and_end_with_a_sign_of_life() -> None:
    reader, writer = pair()
    writer.begin(Step(1), "checkpoint")
    with writer.long_operation(1000.0):
        outer = reader.signs().declared_until
        assert outer > time.monotonic() + 900
        with writer.long_operation(10.0):
            assert reader.signs().declared_until < outer
        assert reader.signs().declared_until == outer
        inside = reader.signs().last_alive_at
    assert reader.signs().declared_until == 0
    assert reader.signs().last_alive_at > inside
    with pytest.raises(ValueError, match="inside"), writer.long_operation(5.0):
        raise ValueError("inside")
    assert reader.signs().declared_until == 0
    writer.close()
    reader.close()


def test_stepping_ends_with_the_empty_phase() -> None:
    reader, writer = pair()
    writer.begin(Step(1), "forward")
    assert reader.signs().stepping
    writer.begin(Step(1), "")
    assert not reader.signs().stepping
    writer.begin(Step(1), "update")
    writer.close()
    assert not reader.signs().stepping, "a script may do other things after its training"
    reader.close()


def test_unknown_phase_is_refused() -> None:
    reader, writer = pair()
    with pytest.raises(InvariantError, match="sleeping"):
        writer.begin(Step(0), "sleeping")
    writer.close()
    reader.close()


def test_worker_cannot_cut_the_page_short() -> None:
    reader = ProgressReader.create()
    with pytest.raises(PermissionError):
        os.ftruncate(reader.descriptor, 0)
    with pytest.raises(PermissionError):
        os.ftruncate(reader.descriptor, 2 * PAGE_BYTES)
    reader.close()


def test_what_is_no_page_is_refused() -> None:
    descriptor = os.memfd_create("no page")
    with pytest.raises(ProtocolError, match="0 bytes"):
        ProgressWriter.open(descriptor)
    os.ftruncate(descriptor, PAGE_BYTES)
    with pytest.raises(ProtocolError, match="format"):
        ProgressWriter.open(descriptor)
    os.close(descriptor)


def test_page_has_no_name_in_any_folder() -> None:
    before = set(os.listdir("/dev/shm"))
    reader = ProgressReader.create()
    assert set(os.listdir("/dev/shm")) <= before
    assert PAGE_BYTES % mmap.PAGESIZE == 0
    reader.close()
