"""The benchmark. This file imports nothing: the PyTorch processes import it, and need no JAX."""
