"""SIGTERM and SIGINT during training: the first stops the run after a step, the second exits."""

import os
import signal
import threading

import jax
from jax.experimental import multihost_utils

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """A context that records signals; the loop calls `reached` after each step.

    Outside it, there is nothing to save, and the signals keep their usual effect. With several
    processes, a signal to one stops all after the same step: JAX's preemption service notifies
    them. Its own handler receives SIGTERM after `jax.distributed.initialize`.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._several = jax.process_count() > 1

    def __enter__(self):
        self._previous = {}
        if threading.current_thread() is threading.main_thread():  # required by Python
            for number in (signal.SIGINT,) if self._several else _SIGNALS:
                self._previous[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._several and self._previous:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _record(self, number, frame):
        self.signal = number
        for handled in _SIGNALS if not self._several else (signal.SIGINT,):
            signal.signal(handled, signal.SIG_DFL)
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)
        self._report()

    def _report(self):
        # print is not reentrant, and the signal may have interrupted one.
        name = signal.Signals(self.signal).name
        text = f"{name}: finishing the step and saving; a second signal exits immediately\n"
        os.write(2, text.encode())

    def reached(self, step: int) -> bool:
        """Whether to stop after this step, the same in every process. Call it at each step."""
        if self._several and multihost_utils.reached_preemption_sync_point(step):
            if self.signal is None:
                self.signal = signal.SIGTERM
                self._report()
            for number in self._previous and _SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            return True
        return not self._several and self.signal is not None
