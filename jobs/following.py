"""Passes on what a run has reached while it trains, from threads that can neither stop nor slow it.

Each calls its look, which reads the run folder, every second. One that raises costs a warning a
minute; one that hangs is left behind at the end.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from jobs.errors import first_line
from serving.progress import log

SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_AFTER_FAILURE = 60.0  # and so at most one warning a minute
SECONDS_AT_THE_END = 10.0  # that the job waits for the last metrics to be passed on, at most

Look = Callable[[], None]


@contextmanager
def following(looks: Mapping[str, Look]) -> Iterator[None]:
    """Calls every look while the block works, and once more at its end.

    Args:
        looks: functions that pass on what is new, by the names of the places that get it.
    """
    followers = [_Follower(place, look) for place, look in looks.items()]
    for follower in followers:
        follower.start()
    try:
        yield
    finally:
        for follower in followers:
            follower.stopped.set()
        end = time.monotonic() + SECONDS_AT_THE_END
        for follower in followers:
            follower.join(max(0.0, end - time.monotonic()))
            if follower.is_alive() or follower.failure:
                why = follower.failure or f"no answer for {SECONDS_AT_THE_END:.0f} s"
                log(f"warning: the last metrics are not in {follower.place}: {why}")


class _Follower(threading.Thread):
    def __init__(self, place: str, look: Look) -> None:
        super().__init__(name=f"metrics to {place}", daemon=True)
        self.place, self.look, self.stopped = place, look, threading.Event()
        self.failure: str | None = None

    def run(self) -> None:
        last = False
        while not last:
            pause = SECONDS_AFTER_FAILURE if self.failure else SECONDS_BETWEEN_LOOKS
            last = self.stopped.wait(pause)
            try:
                self.look()
                self.failure = None
            except Exception as error:  # whatever it is, training continues
                self.failure = first_line(error)
                if not last:
                    log(
                        f"warning: metrics are not in {self.place} yet, training continues: "
                        f"{self.failure}"
                    )
