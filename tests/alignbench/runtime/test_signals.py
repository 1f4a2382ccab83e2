import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from alignbench.runtime.signals import ENDS, TimeLimitError, deferred_interrupt, interrupt_on_every_end, time_limit


@pytest.fixture
def restored() -> Iterator[None]:
    former = {number: signal.getsignal(number) for number in ENDS}
    yield
    for number, handler in former.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", ENDS)
@pytest.mark.usefixtures("restored")
def test_a_request_to_end_waits_until_the_block_is_done(number: int) -> None:
    interrupt_on_every_end()
    done = []

    def update() -> None:
        with deferred_interrupt():
            os.kill(os.getpid(), number)
            done.append("booked")
        done.append("never reached")

    with pytest.raises(KeyboardInterrupt):
        update()
    assert done == ["booked"]


@pytest.mark.usefixtures("restored")
def test_what_the_process_was_started_to_ignore_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    interrupt_on_every_end()
    with deferred_interrupt():
        os.kill(os.getpid(), signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_a_block_that_takes_too_long_is_left_even_where_it_catches_failures() -> None:
    def patient() -> str:
        try:
            time.sleep(60)
        except Exception:
            return "never mind"
        return "done"

    with pytest.raises(TimeLimitError), time_limit(0.05):
        patient()


def test_a_block_in_time_leaves_no_alarm_and_another_one_rings_on() -> None:
    rang = []
    former = signal.signal(signal.SIGALRM, lambda number, frame: rang.append(number))
    outer = signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with time_limit(30):
            pass
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 0.2
        deadline = time.monotonic() + 30
        while not rang and time.monotonic() < deadline:
            time.sleep(0.01)
        assert rang == [signal.SIGALRM]
    finally:
        signal.setitimer(signal.ITIMER_REAL, *outer)
        signal.signal(signal.SIGALRM, former)


def test_other_threads_have_no_limit_and_no_deferral() -> None:
    done = []

    def work() -> None:
        with time_limit(1e-6), deferred_interrupt():
            time.sleep(0.01)
        done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]
