"""Signals that end a run: it stops between two batches, where what it has done can be saved."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")

_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")  # SIGUSR1: a scheduler's warning; Windows has none
SIGNALS = [number for number in signal.Signals if number.name in _NAMES]
PATIENCE = 2  # seconds that a stop waits for a batch


class Stopped(BaseException):
    """A signal ends the run; the text says which.

    Not an Exception, as KeyboardInterrupt is none: torch's loader would catch it.
    """

    def __init__(self, number: int, remark: str = ""):
        super().__init__(f"stopped by {signal.Signals(number).name}{remark}")
        self.number = number

    @property
    def exit_code(self) -> int:
        """130 for SIGINT, else SIGTERM's 143."""
        return 128 + (signal.SIGINT if self.number == signal.SIGINT else signal.SIGTERM)


class StopSignals:
    """While entered, a signal waits until the run asks for it; a second SIGINT ends it at once.

    Outside the main thread, which alone may set handlers, signals do what they did.
    """

    def __init__(self) -> None:
        self._number: int | None = None
        self._is_waiting = False  # for a batch: nothing that an exception would leave half done
        self._handlers: dict[int, Any] = {}  # those of before

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def __exit__(self, *_: object) -> None:
        if self._number is not None and os.name == "posix":
            signal.alarm(0)
        for number, handler in self._handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: not Python's, and lost
        self._number, self._handlers = None, {}

    @property
    def number(self) -> int:
        """The signal that has come; 0: none."""
        return self._number or 0

    def check(self) -> None:
        """Raise Stopped if a signal has come."""
        if self._number is not None:
            raise Stopped(self._number)

    def between(self, batches: Iterable[T], check: Callable[[], Any] | None = None) -> Iterator[T]:
        """The batches; raises Stopped before or behind one, or where one takes too long.

        `check`: raises it instead of this object's own, for ranks that have to agree.
        """
        check = check or self.check
        try:
            check()
            batches = iter(batches)  # loader processes start here, and must not inherit a wait
            while (batch := self._next(batches, check)) is not None:
                yield batch
        except (EOFError, OSError, RuntimeError):
            if self._number is not None:
                check()  # a signal to the process group has ended the loaders too
            raise

    def _next(self, batches: Iterator[T], check: Callable[[], Any]) -> T | None:
        check()
        self._is_waiting = check == self.check  # other ranks may be in the middle of something
        try:
            batch = next(batches, None)
        finally:
            self._is_waiting = False
        check()
        return batch

    def _receive(self, number: int, _: FrameType | None) -> None:
        self._number = self._number or number
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
        if os.name == "posix":
            # Or torch would raise for a loader that the same signal has ended, in the middle of a
            # step. For good: the loaders are joined at the very end.
            signal.signal(signal.SIGCHLD, _do_nothing)
            before = signal.signal(signal.SIGALRM, self._give_up)
            self._handlers.setdefault(signal.SIGALRM, before)
            signal.alarm(PATIENCE)

    def _give_up(self, *_: object) -> None:
        if self._is_waiting:
            self.check()


def _do_nothing(*_: object) -> None:
    pass


def leave_signals_to_parent(_: int) -> None:
    """A loader process ends with its parent, who may need it for another batch until then."""
    for number in SIGNALS:
        if number != signal.SIGTERM:  # torch's own, by which the parent ends a loader that hangs
            signal.signal(number, signal.SIG_IGN)


stop_signals = StopSignals()  # the process's, as signals are
