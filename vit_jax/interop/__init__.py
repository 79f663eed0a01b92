"""Weights of other programs, to and from this project's parameters."""

from vit_jax.interop.notebook import notebook_to_params, params_to_notebook

__all__ = ["notebook_to_params", "params_to_notebook"]
