"""Devices and processes: the mesh, several hosts, preemption, peak rates."""
