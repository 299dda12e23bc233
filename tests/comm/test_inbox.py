"""The inbox: nothing lost, nothing twice, in order; whoever waits is woken, by whatever source."""

import threading
import time
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elaswave.comm.inbox import Inbox
from elaswave.comm.loop import Loop

LIMIT_S = 20.0


def no_failure(error: Exception) -> None:
    raise AssertionError(error)


@given(actions=st.lists(st.sampled_from(["put", "take", "wait"]), max_size=40))
def test_takes_are_the_puts_in_order(actions: list[str]) -> None:
    inbox: Inbox[int] = Inbox()
    numbers = count()
    expected: list[int] = []
    for action in actions:
        if action == "put":
            expected.append(next(numbers))
            inbox.put(expected[-1])
        elif action == "wait":
            assert inbox.wait(0.0) == bool(expected)
        else:
            assert inbox.take_all() == expected
            expected = []
    assert inbox.take_all() == expected
    assert inbox.take_all() == []


def test_what_is_put_back_comes_first_and_in_its_order() -> None:
    inbox: Inbox[int] = Inbox()
    for item in range(4):
        inbox.put(item)
    assert inbox.wait(time.monotonic() + 60)
    taken = inbox.take_all()
    inbox.put(4)
    inbox.put_back(taken[2:])
    inbox.put_back(taken[1:2])
    assert inbox.wait(0.0)
    assert inbox.take_all() == [1, 2, 3, 4]


def test_wait_ends_at_its_deadline() -> None:
    inbox: Inbox[int] = Inbox()
    start = time.monotonic()
    assert not inbox.wait(start + 0.05)
    assert 0.05 <= time.monotonic() - start < LIMIT_S


@pytest.fixture(params=["alone", "driving a loop"])
def inbox(request: pytest.FixtureRequest) -> Inbox[int]:
    made: Inbox[int] = Inbox()
    if request.param != "alone":
        loop = Loop(on_failure=no_failure, on_end=lambda: None)
        loop.start()
        made.attach(loop)
        request.addfinalizer(lambda: loop.stop(LIMIT_S))
    return made


def test_an_item_of_another_thread_wakes_the_consumer_each_time(inbox: Inbox[int]) -> None:
    """Ping-pong: the consumer always waits for the item that its own last step has asked for."""
    asked = threading.Semaphore(0)
    rounds = 300

    def put_when_asked() -> None:
        for number in range(rounds):
            asked.acquire()
            inbox.put(number)

    putter = threading.Thread(target=put_when_asked)
    putter.start()
    for number in range(rounds):
        asked.release()
        assert inbox.wait(time.monotonic() + LIMIT_S)
        assert inbox.take_all() == [number]
    putter.join()


def test_many_sources_lose_nothing_and_keep_their_order(inbox: Inbox[int]) -> None:
    sources, each = 4, 500

    def put(source: int) -> None:
        for number in range(each):
            inbox.put(source * each + number)

    threads = [threading.Thread(target=put, args=(source,)) for source in range(sources)]
    for thread in threads:
        thread.start()
    taken: list[int] = []
    while len(taken) < sources * each:
        assert inbox.wait(time.monotonic() + LIMIT_S)
        taken += inbox.take_all()
    for thread in threads:
        thread.join()
    assert inbox.take_all() == []
    for source in range(sources):
        mine = [item for item in taken if item // each == source]
        assert mine == list(range(source * each, source * each + each))


def test_waiting_goes_on_after_the_loop_has_ended() -> None:
    inbox: Inbox[int] = Inbox()
    loop = Loop(on_failure=no_failure, on_end=lambda: None)
    loop.start()
    inbox.attach(loop)
    ender = threading.Thread(target=lambda: (loop.stop(LIMIT_S), inbox.put(1)))
    ender.start()
    assert inbox.wait(time.monotonic() + LIMIT_S)
    assert inbox.take_all() == [1]
    ender.join()


def test_who_stays_has_the_turns_until_he_leaves(request: pytest.FixtureRequest) -> None:
    inbox: Inbox[int] = Inbox()
    loop = Loop(on_failure=no_failure, on_end=lambda: None)
    loop.start()
    request.addfinalizer(lambda: loop.stop(LIMIT_S))
    inbox.attach(loop)
    loop.call_soon(lambda: inbox.put(1))
    assert inbox.wait(time.monotonic() + LIMIT_S, stay=True) and inbox.take_all() == [1]
    assert not inbox.wait(time.monotonic() + 0.01, stay=True)
    ran = threading.Event()
    loop.call_soon(ran.set)
    assert not ran.wait(0.1), "nobody else runs turns"
    inbox.leave()
    assert ran.wait(LIMIT_S)
    inbox.leave()  # again: nothing happens


def test_a_poll_brings_what_is_there_without_waiting(request: pytest.FixtureRequest) -> None:
    inbox: Inbox[int] = Inbox()
    inbox.poll()  # there is nothing to drive
    loop = Loop(on_failure=no_failure, on_end=lambda: None)
    loop.start()
    request.addfinalizer(lambda: loop.stop(LIMIT_S))
    inbox.attach(loop)
    assert not inbox.wait(time.monotonic() + 0.01)  # from now on the loop's own thread holds back for a while
    loop.call_soon(lambda: inbox.put(1))
    inbox.poll()
    assert inbox.take_all() == [1]
    inbox.poll()
    assert inbox.take_all() == []
    loop.stop(LIMIT_S)
    inbox.poll()  # it has ended
