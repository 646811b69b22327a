"""A signal sets a cooperative shutdown flag; a second one ends the process at once."""

import os
import signal
import threading

import pytest

from jobs import interruption
from jobs.errors import Interrupted


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_waits_for_the_next_check(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with interruption.graceful():
        interruption.check()
        os.kill(os.getpid(), number)
        with pytest.raises(Interrupted, match=f"{number.name}: state saved"):
            interruption.check()
        assert signal.getsignal(number) is signal.SIG_DFL, "the second one kills"
    assert signal.getsignal(number) is before
    interruption.check()


def test_in_another_thread_the_work_goes_on_without_signals() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work() -> None:
        with interruption.graceful():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
