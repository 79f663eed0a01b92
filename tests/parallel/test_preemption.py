"""Signals during training; tests/faults sends them to complete runs."""

import os
import signal

from vit_jax.parallel.preemption import StopSignal


def test_first_signal_is_recorded_and_the_second_has_its_usual_effect(capfd):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with StopSignal() as stop:
        assert not stop.reached(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reached(2) and stop.signal == signal.SIGTERM
        for number in (signal.SIGTERM, signal.SIGINT):
            assert signal.getsignal(number) == signal.SIG_DFL
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    assert capfd.readouterr().err == (
        "SIGTERM: finishing the step and saving; a second signal exits immediately\n"
    )
