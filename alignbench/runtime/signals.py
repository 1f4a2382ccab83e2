"""Signals: a request to end waits for the right moment, and what never ends is given up."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, a polite request to end, a terminal that was closed: each leaves a checkpoint."""


class TimeLimitError(BaseException):
    """A block took too long. No Exception, so that what it interrupts does not take it for a failure of its own."""


def interrupt_on_every_end() -> None:
    """SIGTERM and SIGHUP are as good as Ctrl-C; one that the process was started to ignore (nohup) stays ignored."""
    for number in ENDS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def deferred_interrupt() -> Iterator[None]:
    """Holds back requests to end until the block is done; raises KeyboardInterrupt then."""
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
    """Raises TimeLimitError inside the block after so many seconds of a clock that does not jump; None for no limit.

    Only the main thread can be interrupted, and code outside Python only once it comes back; elsewhere there is no limit.
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
        if left:  # somebody else's alarm
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - began), 1e-3), interval)
