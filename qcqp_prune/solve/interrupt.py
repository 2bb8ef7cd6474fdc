"""Ctrl-C while a solver runs: the first one asks it to stop and hand over what it holds, the second one aborts."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def catch_interrupt(also: Callable[[], bool]) -> Iterator[Callable[[], bool]]:
    """Give a function that turns True after Ctrl-C, or once ``also`` does.

    Where the caller has its own handler, or outside the main thread, where no handler can be set, only ``also`` counts.
    """
    asked = threading.Event()

    def handle(_signum: int, _frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if ours:
        signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: asked.is_set() or also()
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
