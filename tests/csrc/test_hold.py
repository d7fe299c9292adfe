"""Hold: a lock is held while its block runs, and never longer."""

from __future__ import annotations

import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

import pytest

from w2s_fast._pages import Hold


def test_a_lock_is_held_for_the_block_and_what_is_to_be_called_is() -> None:
    lock = threading.Lock()
    seen: list[tuple[str, bool]] = []

    def note(what: str) -> None:
        seen.append((what, lock.locked()))

    with Hold(
        lock,
        begin=lambda: note("begin"),
        end=lambda error: note(f"end {error}"),
        after=lambda: note("after"),
    ) as had:
        assert had is True
        note("block")
    assert seen == [("begin", True), ("block", True), ("end None", True), ("after", False)]


def test_what_ends_the_block_is_told_and_goes_on() -> None:
    lock = threading.Lock()
    met: list[BaseException | None] = []
    error = KeyboardInterrupt("for the test")
    with pytest.raises(KeyboardInterrupt) as raised, Hold(lock, end=met.append):
        raise error
    assert raised.value is error
    assert met == [error]
    assert not lock.locked()


def test_whoever_raises_the_lock_is_given_back() -> None:
    lock = threading.Lock()

    def fail(*_: Any) -> None:
        raise MemoryError("for the test")

    with pytest.raises(MemoryError), Hold(lock, end=fail, after=pytest.fail):
        pass
    assert not lock.locked()
    with pytest.raises(MemoryError), Hold(lock, after=fail):
        pass
    assert not lock.locked()
    met: list[BaseException | None] = []
    with pytest.raises(MemoryError), Hold(lock, begin=fail, end=met.append):
        pytest.fail("the block runs")
    assert [type(error) for error in met] == [MemoryError]
    assert not lock.locked()


def test_a_block_that_never_comes_to_its_exit_gives_the_lock_back() -> None:
    """Python runs the line of ``with`` once more, before it calls ``__exit__``."""
    lock = threading.Lock()
    ended: list[BaseException | None] = []
    lines: list[int] = []

    def block() -> None:
        with Hold(lock, end=ended.append):
            assert lock.locked()

    def trace(frame: FrameType, kind: str, _: object) -> Any:
        if frame.f_code is block.__code__ and kind == "line":
            lines.append(frame.f_lineno)
            if lines.count(lines[0]) == 2:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with pytest.raises(KeyboardInterrupt) as kept:
            block()
    finally:
        sys.settrace(before)
    assert not lock.locked()
    assert ended == [None]
    assert kept.value is not None  # with all frames


def test_a_lock_that_another_has_is_not_waited_for_unless_wanted() -> None:
    lock = threading.Lock()
    with Hold(lock), Hold(lock, wait=False, begin=pytest.fail, end=pytest.fail) as had:
        assert had is False
        assert lock.locked()
    with Hold(lock, wait=False) as had:
        assert had is True
    assert not lock.locked()


def test_an_interrupt_while_it_is_waited_for_leaves_the_queue() -> None:
    lock, queue = threading.Lock(), threading.Lock()
    lock.acquire()
    main = threading.get_ident()

    def interrupt() -> None:
        while not queue.locked():
            pass
        time.sleep(0.05)  # until it waits, most likely; before that it is interrupted as well
        signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        thread.start()
        with pytest.raises(KeyboardInterrupt), Hold(lock, queue=queue, begin=pytest.fail):
            pytest.fail("the block runs")
        thread.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert not queue.locked()
    assert lock.locked()  # its owner's, as before
