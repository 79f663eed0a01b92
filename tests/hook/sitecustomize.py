"""Runs at the start of every Python process that the tests start, by way of PYTHONPATH."""

import os

import fetch_guard
import quick_compile

fetch_guard.when_jax_is_imported(fetch_guard.install, quick_compile.install)
if os.environ.get("FAULTS_UNDER"):
    import kill_at  # noqa: F401
