"""Signals: requests to end can be deferred, and blocks of code can have a time limit."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The signals after which a run writes a checkpoint: Ctrl-C, `kill`, and a closed terminal."""


class TimeLimitError(BaseException):
    """A block took too long. This is not an Exception, so that interrupted code does not handle it as its own failure."""


def interrupt_on_every_end() -> None:
    """Makes SIGTERM and SIGHUP act like Ctrl-C. A signal that the process was started to ignore (nohup) stays ignored."""
    for number in ENDS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def deferred_interrupt() -> Iterator[None]:
    """Defers requests to end until the block is done, and raises KeyboardInterrupt then."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[int] = []
    former = {n: signal.getsignal(n) for n in ENDS if signal.getsignal(n) is not signal.SIG_IGN}
    for number in former:
        signal.signal(number, lambda number, frame: asked.append(number))
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    if asked:
        raise KeyboardInterrupt


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raises TimeLimitError inside the block after a number of seconds; None sets no limit.

    Only the main thread can be interrupted; other threads have no limit. Code outside Python is interrupted when it returns.
    """
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise TimeLimitError

    handler, began = signal.signal(signal.SIGALRM, ring), time.monotonic()
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:  # an alarm that other code had set
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - began), 1e-3), interval)
