"""Signals that end a run: at once, or in a training where it can next be saved."""

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
SIGNALS = [s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGUSR1")]


class Stopped(BaseException):
    """A signal ends the run. Not an Exception: torch's loader catches those."""

    def __init__(self, number: int, remark: str = ""):
        super().__init__(f"stopped by {signal.Signals(number).name}{remark}")
        self.number = number
        self.exit_code = 130 if number == signal.SIGINT else 143


class StopSignal:
    """In its block a signal ends the run: at once, or in `deferred` where `check` is called.

    A second SIGINT is Python's own. Outside the main thread, where Python sets no handlers, nothing
    changes.
    """

    def __init__(self) -> None:
        self._number, self._is_deferred = 0, False

    def __enter__(self) -> None:
        self._number, self._before = 0, {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: it was not set by Python

    def _receive(self, number: int, _: FrameType | None) -> None:
        self._number = self._number or number
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
        if not self._is_deferred:
            raise Stopped(number)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """In this block nothing is interrupted, but for where it calls `check`."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False

    def check(self) -> None:
        """Raise Stopped if a signal has come to any process of the training."""
        if number := max(number for (number,) in all_gather_ints([self._number])):
            raise Stopped(number)


stop_signal = StopSignal()  # one for the process, as its signals are


def leave_signals_to_parent(_: int) -> None:
    """For a loader process: its parent may need one more batch before it stops."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_loaders() -> None:
    """Python would end them by SIGTERM, which they ignore, and wait for them."""
    if hasattr(signal, "SIGCHLD"):  # torch's handler would call this an error
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
