"""The tests enforce the transfer guard from device to host, in this process and its children."""

import concurrent.futures
import subprocess
import sys

import fetch_guard
import jax
import jax.numpy as jnp
import numpy as np
import pytest

FETCHES = {
    "float": float,
    "bool": bool,
    "asarray": lambda x: np.asarray(x),  # looks numpy's function up when called
    "array of a list": lambda x: np.array([x]),
}


@pytest.mark.parametrize("name", FETCHES)
def test_implicit_fetch_raises(name):
    x, fetch = jnp.float32(3), FETCHES[name]
    with jax.transfer_guard("disallow"):
        with pytest.raises(fetch_guard.ImplicitFetch):
            fetch(x)
        assert jax.device_get(x) == 3
        with jax.transfer_guard("allow"):
            assert np.all(fetch(x))


def test_guard_is_per_thread():
    x = jnp.float32(3)
    with concurrent.futures.ThreadPoolExecutor() as pool, jax.transfer_guard("disallow"):
        assert pool.submit(float, x).result() == 3


def test_child_processes_enforce_the_guard():
    code = "import jax\nwith jax.transfer_guard('disallow'): float(jax.device_put(1.0))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "ImplicitFetch: implicit device-to-host" in done.stderr
