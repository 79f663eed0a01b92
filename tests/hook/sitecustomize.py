"""Runs at the start of every Python process that the tests start, by way of PYTHONPATH."""

import os

import fetch_guard

fetch_guard.install_when_jax_is_imported()
if os.environ.get("FAULTS_UNDER"):
    import kill_at  # noqa: F401
