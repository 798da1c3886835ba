"""Signals and time limits: how a loop is asked to end, and with which command it goes on."""

import math
import os
import shlex
import signal
import sys
import threading
import time

import torch.distributed as dist

from common import is_main, world


class Stop:
    """Asks a loop to end after what it is at: SIGTERM, SIGINT or SIGHUP came, or so many minutes are over.
    A second signal acts at once; what the caller ignores, as nohup does, stays ignored."""

    def __init__(self, minutes: float | None):
        self.code, self.until = 0, time.monotonic() + (math.inf if minutes is None else 60 * minutes)
        self.listen(self.ask)

    def listen(self, handler=None) -> None:
        """Have `handler`, or none as before, called for the signals."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
                    signal.signal(number, handler or usual)

    def ask(self, number: int, _) -> None:
        self.code = 128 + number
        self.listen()
        os.write(2, f"\n{signal.Signals(number).name}: stopping soon; once more to stop at once\n".encode())

    def asked(self) -> int:
        """0, or the exit code: 128 + the signal's number, or, as of timeout(1), 124."""
        return self.code or (124 if time.monotonic() >= self.until else 0)

    def leave(self, what: str, *more: str) -> None:
        """Say what was done, and with which command it goes on (with the flags `more`); exit."""
        self.listen()
        words = sys.argv + [flag for flag in more if flag not in sys.argv]
        launcher = f"torchrun --nproc_per_node {world()[1]}" if dist.is_initialized() else "python"
        if is_main():
            print(f"{what}; go on with\n{launcher} {shlex.join(words)}", flush=True)
        raise SystemExit(self.asked() or 143)
