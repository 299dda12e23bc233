"""The contract of stores; every backend runs the same tests."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from elaswave.errors import ConfigError, InvariantError
from elaswave_controller.store import Compacted, Entry, Store
from elaswave_controller.store.memory import open_memory_store

LIMIT_S = 10.0
HISTORY = 20
Check = Callable[[Store], Awaitable[None]]


@pytest.fixture(params=["memory", "memory with log"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Check], None]:
    """Runs a check against a fresh store of each kind."""
    log = tmp_path / "store.log" if request.param == "memory with log" else None

    def run_check(check: Check) -> None:
        async def body() -> None:
            store = open_memory_store(log, history=HISTORY)
            try:
                async with asyncio.timeout(LIMIT_S):
                    await check(store)
            finally:
                await store.close()

        asyncio.run(body())

    return run_check


async def take(entries: AsyncIterator[Entry], count: int) -> list[Entry]:
    """The next `count` entries of a watch."""
    return [await anext(entries) for _ in range(count)]


def test_a_key_that_was_never_written_is_not_there(run: Callable[[Check], None]) -> None:
    async def check(store: Store) -> None:
        assert await store.get("plan") is None

    run(check)


def test_create_succeeds_once(run: Callable[[Check], None]) -> None:
    async def check(store: Store) -> None:
        first = await store.create_if_absent("plan", b"one")
        second = await store.create_if_absent("plan", b"two")
        assert first.succeeded
        assert not second.succeeded
        assert second.entry == first.entry == await store.get("plan") == Entry(key="plan", value=b"one", revision=1)

    run(check)


def test_compare_and_set_needs_the_newest_revision(run: Callable[[Check], None]) -> None:
    async def check(store: Store) -> None:
        assert not (await store.compare_and_set("plan", b"one", 1)).succeeded
        await store.create_if_absent("other", b"x")
        created = (await store.create_if_absent("plan", b"one")).entry
        assert created is not None
        assert created.revision == 2
        written = await store.compare_and_set("plan", b"two", created.revision)
        assert written.succeeded
        late = await store.compare_and_set("plan", b"three", created.revision)
        assert not late.succeeded
        assert late.entry == written.entry == Entry(key="plan", value=b"two", revision=3)

    run(check)


def test_of_many_writers_one_wins_each_round(run: Callable[[Check], None]) -> None:
    async def check(store: Store) -> None:
        revision = 0
        for _ in range(5):
            if revision:
                writes = [store.compare_and_set("plan", str(i).encode(), revision) for i in range(8)]
            else:
                writes = [store.create_if_absent("plan", str(i).encode()) for i in range(8)]
            outcomes = await asyncio.gather(*writes)
            assert sum(outcome.succeeded for outcome in outcomes) == 1
            entry = await store.get("plan")
            assert entry is not None
            revision = entry.revision

    run(check)


def test_watch_tells_the_past_and_the_future_of_a_prefix(run: Callable[[Check], None]) -> None:
    async def check(store: Store) -> None:
        await store.create_if_absent("jobs/a/plan", b"1")
        await store.create_if_absent("jobs/b/plan", b"2")
        entries = store.watch("jobs/a/", 1)
        assert [entry.value for entry in await take(entries, 1)] == [b"1"]
        waiting = asyncio.ensure_future(take(entries, 2))
        await store.compare_and_set("jobs/a/plan", b"3", 1)
        await store.create_if_absent("jobs/b/other", b"4")
        await store.create_if_absent("jobs/a/other", b"5")
        assert [(entry.key, entry.value) for entry in await waiting] == [("jobs/a/plan", b"3"), ("jobs/a/other", b"5")]

    run(check)


def test_watch_resumes_after_the_last_revision_seen(run: Callable[[Check], None]) -> None:
    async def check(store: Store) -> None:
        for number in range(10):
            await store.create_if_absent(f"key{number}", b"")
        seen = await take(store.watch("", 1), 4)
        rest = await take(store.watch("", seen[-1].revision + 1), 6)
        assert [entry.key for entry in seen + rest] == [f"key{number}" for number in range(10)]

    run(check)


def test_a_watch_that_wants_too_old_revisions_is_told(run: Callable[[Check], None]) -> None:
    async def check(store: Store) -> None:
        await store.create_if_absent("plan", b"")
        for revision in range(1, 2 * HISTORY):
            assert (await store.compare_and_set("plan", b"x", revision)).succeeded
        with pytest.raises(Compacted, match="revision 1 is no longer kept"):
            await anext(store.watch("", 1))
        assert (await anext(store.watch("", 2 * HISTORY))).revision == 2 * HISTORY

    run(check)


def test_close_ends_watches_and_use(run: Callable[[Check], None]) -> None:
    async def check(store: Store) -> None:
        waiting = asyncio.ensure_future(take(store.watch("", 1), 1))
        await asyncio.sleep(0)
        await store.close()
        with pytest.raises(StopAsyncIteration):
            await waiting
        with pytest.raises(InvariantError):
            await store.get("plan")
        await store.close()

    run(check)


@pytest.mark.parametrize("key", ["", "k" * 513])
def test_keys_have_limits(run: Callable[[Check], None], key: str) -> None:
    async def check(store: Store) -> None:
        with pytest.raises(ConfigError, match="1 to 512 bytes"):
            await store.create_if_absent(key, b"")

    run(check)


# ------------------------------------------------------------------ the log


def write(path: Path, *values: bytes) -> None:
    """Leave a store log with one key that had `values`."""

    async def body() -> None:
        store = open_memory_store(path)
        revision = 0
        for value in values:
            if revision:
                outcome = await store.compare_and_set("plan", value, revision)
            else:
                outcome = await store.create_if_absent("plan", value)
            assert outcome.entry is not None
            revision = outcome.entry.revision
        await store.close()

    asyncio.run(body())


def read(path: Path) -> list[tuple[bytes, int]]:
    """All versions in a log, as a watch from the beginning tells them."""

    async def body() -> list[tuple[bytes, int]]:
        store = open_memory_store(path)
        newest = await store.get("plan")
        count = 0 if newest is None else newest.revision
        found = await take(store.watch("", 1), count)
        await store.close()
        return [(entry.value, entry.revision) for entry in found]

    return asyncio.run(body())


def test_what_was_written_is_there_after_a_restart(tmp_path: Path) -> None:
    write(tmp_path / "log", b"one", b"two", b"")
    assert read(tmp_path / "log") == [(b"one", 1), (b"two", 2), (b"", 3)]


def test_a_log_cut_anywhere_in_its_last_record_keeps_the_others(tmp_path: Path) -> None:
    write(tmp_path / "short", b"one", b"two")
    whole = tmp_path / "whole"
    write(whole, b"one", b"two", b"three")
    data = whole.read_bytes()
    for length in range((tmp_path / "short").stat().st_size, len(data)):
        cut = tmp_path / "cut"
        cut.write_bytes(data[:length])
        assert read(cut) == [(b"one", 1), (b"two", 2)]
        assert read(cut) == [(b"one", 1), (b"two", 2)], "opening it again"


def test_a_damaged_record_ends_the_log(tmp_path: Path) -> None:
    path = tmp_path / "log"
    write(path, b"one", b"two")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert read(path) == [(b"one", 1)]


def test_another_kind_of_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("my thesis")
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError, match="is not a store log"):
        open_memory_store(path)
    assert path.read_text() == "my thesis"
    assert len(os.listdir("/proc/self/fd")) == descriptors
