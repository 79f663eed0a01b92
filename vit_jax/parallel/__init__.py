"""Devices and processes: mesh, multi-process setup, preemption, and peak FLOP/s."""
