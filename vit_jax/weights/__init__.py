"""Pretrained weights: reading and writing other libraries' files, and fine-tuning from them."""

from vit_jax.weights.finetune import start_from
from vit_jax.weights.layouts import from_params, notebook_to_params, params_to_notebook
from vit_jax.weights.load import load_weights
from vit_jax.weights.save import save_weights
