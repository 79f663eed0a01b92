"""Weights of other programs, to and from this project's parameters.

`vit_jax.load_weights(path)` reads any of them; `python -m vit_jax export` writes them.
"""

from vit_jax.interop.notebook import notebook_to_params, params_to_notebook
from vit_jax.interop.positions import resize_positions

__all__ = ["notebook_to_params", "params_to_notebook", "resize_positions"]
