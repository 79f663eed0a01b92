"""SIGTERM and SIGINT while training: the first asks the run to stop, the second ends it at once."""

import os
import signal
import threading

import jax
from jax.experimental import multihost_utils

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """A `with` in which a signal is only noted, for the loop to ask `reached` after each step.

    Before and after it, where there is nothing to save, the signals do what they always do. Of
    several processes one signal stops all after the same step: JAX's pre-emption service carries
    the word, whose own handler takes SIGTERM from `jax.distributed.initialize` on.
    """

    def __init__(self):
        self.signal = None
        self._several = jax.process_count() > 1

    def __enter__(self):
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # Python lets no other
            for number in (signal.SIGINT,) if self._several else _SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._several and self._before:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _note(self, number, frame):
        self.signal = number
        for each in _SIGNALS if not self._several else (signal.SIGINT,):
            signal.signal(each, signal.SIG_DFL)
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)
        self._say()

    def _say(self):
        # Not print: the signal may have come in the middle of one.
        name = signal.Signals(self.signal).name
        os.write(2, f"{name}: finishing the step and saving; a second one quits at once\n".encode())

    def reached(self, step):
        """Whether to stop after this step: the same answer in every process, asked at each step."""
        if self._several and multihost_utils.reached_preemption_sync_point(step):
            if self.signal is None:
                self.signal = signal.SIGTERM
                self._say()
            for number in self._before and _SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            return True
        return not self._several and self.signal is not None
