"""Signals that end a run: a number that the run asks for where it can save."""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ops.collectives import all_gather_ints

# SIGUSR1 is a scheduler's warning; Windows has none.
NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")
SIGNALS = [signal.Signals[name] for name in NAMES if name in signal.Signals.__members__]


class Stopped(BaseException):
    """A signal ends the run; the text says which.

    Not an Exception, as KeyboardInterrupt is none: torch's loader would catch it.
    """

    def __init__(self, number: int, remark: str = ""):
        super().__init__(f"stopped by {signal.Signals(number).name}{remark}")
        self.number = number
        # 130 for SIGINT, else SIGTERM's 143.
        self.exit_code = 128 + (signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)


class StopSignal:
    """While entered, a signal ends the run: at once, or in `deferred` where `check` is called.

    A second SIGINT is Python's own. Outside the main thread, which alone may set handlers, signals
    do what they did.
    """

    def __init__(self) -> None:
        self._number, self._is_deferred = 0, False

    def __enter__(self) -> None:
        self._number, self._before = 0, {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: not Python's, and lost

    def _receive(self, number: int, _: FrameType | None) -> None:
        self._number = self._number or number
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
        if not self._is_deferred:
            raise Stopped(number)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """What runs in here is not interrupted; it calls `check` where it can end."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False

    def check(self) -> None:
        """Raise Stopped if a signal has come, to this process or to another one of the training."""
        number = max(number for (number,) in all_gather_ints([self._number]))
        if number:
            raise Stopped(number)


stop_signal = StopSignal()  # the process's, as signals are


def leave_signals_to_parent(_: int) -> None:
    """In a loader process: the parent may need one more batch before it stops."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_loaders() -> None:
    """They ignore SIGTERM, by which Python would end them before it waits for them."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
