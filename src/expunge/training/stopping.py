"""Ctrl-C and SIGTERM: a training step is finished and saved first, anything else ends at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether somebody asked the run to stop."""

    def __init__(self) -> None:
        self.requested = False
        self.can_resume = False
        """Set once there is a state to go on from; until then a signal ends the run at once."""
        self.exit_code = 130

    def receive(self, number: int, _frame: FrameType | None) -> None:
        """Handles a signal; the second one does not wait for the step."""
        self.exit_code = 128 + number
        if self.requested or not self.can_resume:
            raise KeyboardInterrupt
        self.requested = True


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Listens for signals while the body runs; only the main thread can, others are not stopped."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.receive) for number in _SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
