"""Imported by sitecustomize: kills the process at a chosen call.

Counts fsync and the calls that change files under FAULTS_UNDER, as reported by Python's audit
events. With FAULTS_AT=N, SIGKILL ends the process just before call N. FAULTS_LOG gets a line for
call N only, or for every call if FAULTS_AT is unset or 0.
"""

import os
import signal
import threading

_UNDER, _AT = os.environ.get("FAULTS_UNDER"), int(os.environ.get("FAULTS_AT", 0))
_CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}
_lock, _count = threading.Lock(), 0


def _note(event, path):
    global _count
    path = os.fsdecode(path)
    if not path.startswith(_UNDER) or path == os.environ["FAULTS_LOG"]:
        return
    with _lock:
        _count += 1
        if _AT in (0, _count):
            log = os.open(os.environ["FAULTS_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(log, f"{event} {path}\n".encode())
            os.close(log)
        if _count == _AT:
            os.kill(os.getpid(), signal.SIGKILL)


def _audit(event, args):
    if event == "open" and isinstance(args[0], (str, bytes)):
        if args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            _note(event, args[0])
    elif event in _CHANGES and isinstance(args[0], (str, bytes)):
        _note(event, args[0])


if _UNDER:
    import sys

    _fsync = os.fsync

    def fsync(descriptor):
        _note("os.fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        _fsync(descriptor)

    os.fsync = fsync
    sys.addaudithook(_audit)
