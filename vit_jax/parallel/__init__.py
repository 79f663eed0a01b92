"""Devices and processes: mesh, backend, multi-process setup, preemption, and GPU targets."""
