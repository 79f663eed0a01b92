"""Signals during training; tests/faults sends them to complete runs."""

import errno
import os
import signal

from vit_jax.parallel import preemption
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


def test_closed_stderr_does_not_prevent_the_stop(monkeypatch):
    def write(descriptor, data):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(preemption.os, "write", write)
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reached(1) and stop.signal == signal.SIGTERM


def test_with_several_processes_all_stop_or_none(monkeypatch):
    """Ctrl-C in one process counts once JAX's preemption service has told every process."""
    told = []
    monkeypatch.setattr(preemption.jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        preemption.multihost_utils, "reached_preemption_sync_point", lambda step: bool(told)
    )
    service = signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert told == [signal.SIGTERM] and stop.signal is None
            assert stop.reached(1) and stop.signal == signal.SIGINT
    finally:
        signal.signal(signal.SIGTERM, service)
