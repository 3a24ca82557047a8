"""Signals that end a run: it stops between two batches, where what it has done can be saved."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, TypeVar

T = TypeVar("T")

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]  # the last: a scheduler's warning
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
        self._is_waiting = False  # nothing that an exception would leave half done
        self._handlers: dict[int, Any] = {}  # those of before

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def __exit__(self, *_: object) -> None:
        if self._number is not None:
            signal.signal(signal.SIGCHLD, _do_nothing)  # torch's, if loaders came after ours
            for loader in multiprocessing.active_children():
                loader.kill()  # torch gives each that hangs 5 s, one after the other
        while self._handlers:  # a signal that comes meanwhile adds the alarm's, to the end
            number = next(iter(self._handlers))
            handler = self._handlers.pop(number)
            signal.signal(number, handler or signal.SIG_DFL)  # None: not Python's, and lost
            if number not in SIGNALS:
                signal.alarm(0)
        self._number = None

    @property
    def number(self) -> int:
        """The signal that has come; 0: none."""
        return self._number or 0

    def check(self) -> None:
        """Raise Stopped if a signal has come."""
        if self._number is not None:
            raise Stopped(self._number)

    @contextmanager
    def waiting(self, check: Callable[[], Any] | None = None) -> Iterator[None]:
        """What runs in here leaves nothing half done: a signal ends it within PATIENCE seconds.

        `check`: raises Stopped instead of this object's own, for ranks that have to agree; what
        runs is not broken off then, since other ranks may be in the middle of something.
        """
        (check or self.check)()
        self._is_waiting = check is None
        try:
            yield
        finally:
            self._is_waiting = False
        (check or self.check)()

    def between(self, batches: Iterable[T], check: Callable[[], Any] | None = None) -> Iterator[T]:
        """The batches; raises Stopped before or behind one, or where one takes too long.

        `check`: as in `waiting`.
        """
        try:
            (check or self.check)()
            batches = iter(batches)  # loader processes start here, and must not inherit a wait
            while True:
                with self.waiting(check):
                    batch = next(batches, None)
                if batch is None:
                    return
                yield batch
        except (EOFError, OSError, RuntimeError):
            if self._number is not None:
                (check or self.check)()  # a signal to the process group has ended the loaders too
            raise

    def _receive(self, number: int, _: FrameType | None) -> None:
        self._number = self._number or number
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
        # Or torch would raise for a loader that the same signal has ended, in the middle of a step.
        # For good: the loaders are joined at the very end.
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
    sys.excepthook = _hide_lost_parent


def _hide_lost_parent(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Of multiprocessing's thread, whose parent leaves while it is handed a batch."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


stop_signals = StopSignals()  # the process's, as signals are
