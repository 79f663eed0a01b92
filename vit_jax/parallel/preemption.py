"""SIGTERM and SIGINT during training: the first stops the run after a step, the second exits."""

import contextlib
import os
import signal

import jax
from jax.experimental import multihost_utils


class StopSignal:
    """A context that records signals; the loop calls `reached` after each step.

    Outside it, there is nothing to save, and the signals keep their usual effect. With several
    processes, a signal to one stops all after the same step: JAX's preemption service, which
    handles SIGTERM, notifies them.
    """

    def __init__(self) -> None:
        self.signal: int | None = None  # set in every process, or in none
        self._received: int | None = None  # in this process
        self._several = jax.process_count() > 1
        self._handled = [signal.SIGINT] if self._several else [signal.SIGTERM, signal.SIGINT]

    def __enter__(self):
        self._previous = {signal.SIGTERM: signal.SIG_DFL}
        self._previous |= {n: signal.signal(n, self._handle) for n in self._handled}
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        for handled in self._handled:
            signal.signal(handled, signal.SIG_DFL)
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self.signal = number
        self._announce(number)

    def _announce(self, number):
        self._received = number
        # print is not reentrant, and the signal may have interrupted one.
        name = signal.Signals(number).name
        text = f"{name}: finishing the step and saving; a second signal exits immediately\n"
        with contextlib.suppress(OSError):  # Ctrl-C also ends the tee that stderr is piped to
            os.write(2, text.encode())

    def reached(self, step: int) -> bool:
        """Returns whether to stop after this step, the same in every process. Call it each step."""
        if self._several and multihost_utils.reached_preemption_sync_point(step):
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            if self._received is None:
                self._announce(signal.SIGTERM)
            self.signal = self._received
        return self.signal is not None
