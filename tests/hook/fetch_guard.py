"""Makes JAX's CPU client enforce the transfer guard from device to host, as its GPU client does.

Under `jax.transfer_guard("disallow")` an implicit fetch raises: numpy's `asarray` or `array` of a
jax.Array, or its use as a Python number. `jax.device_get` passes. Other numpy functions read a CPU
array through the buffer protocol, which cannot be hooked.
"""

import functools
import importlib.abc
import importlib.machinery
import sys


class ImplicitFetch(RuntimeError):
    """A fetch from the device that the transfer guard disallows."""


def install():
    """Starts to enforce the guard in this process; returns a function that undoes it."""
    import numpy as np
    from jax._src.array import ArrayImpl
    from jax._src.lib import guard_lib

    here = guard_lib.thread_local_state  # the guard is per thread
    refuses = (
        guard_lib.TransferGuardLevel.DISALLOW,
        guard_lib.TransferGuardLevel.DISALLOW_EXPLICIT,
    )

    def disallowed():
        return here().device_to_host in refuses and not here().explicit_device_get

    def check(x):
        if isinstance(x, (list, tuple)):
            for each in x:
                check(each)
        elif isinstance(x, ArrayImpl) and x._npy_value is None and disallowed():
            raise ImplicitFetch(f"implicit device-to-host fetch of {x.aval}: use jax.device_get")

    def checked(function):
        @functools.wraps(function)
        def call(x, *args, **kwargs):
            check(x)
            return function(x, *args, **kwargs)

        return call

    value, functions = ArrayImpl._value, {n: getattr(np, n) for n in ("asarray", "array")}
    ArrayImpl._value = property(checked(value.fget))
    for name, function in functions.items():
        setattr(np, name, checked(function))

    def undo():
        ArrayImpl._value = value
        for name, function in functions.items():
            setattr(np, name, function)

    return undo


class _WhenImported(importlib.abc.MetaPathFinder):
    """Calls functions once `jax` has been imported: most child processes never do."""

    def __init__(self, functions):
        self.functions = functions

    def find_spec(self, name, path=None, target=None):
        if name != "jax":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None:
            execute = spec.loader.exec_module

            def execute_and_call(module):
                execute(module)
                for function in self.functions:
                    function()

            spec.loader.exec_module = execute_and_call
        return spec


def when_jax_is_imported(*functions):
    """Calls functions, such as `install`, as soon as this process has imported jax."""
    sys.meta_path.insert(0, _WhenImported(functions))
