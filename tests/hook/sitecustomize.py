"""Python runs this at the start of every process that the tests start: it is on their PYTHONPATH."""

import os

import fetch_guard

fetch_guard.install_when_jax_is_imported()
if os.environ.get("FAULTS_UNDER"):
    import kill_at  # noqa: F401
