"""Vision Transformers in JAX. `load` restores a run; `load_weights` reads pretrained weights."""

__version__ = "0.1.0"


def __getattr__(name):  # imported on first use, to keep vit_jax light
    if name == "load":
        from vit_jax.inference.trained import load

        return load
    if name == "load_weights":
        from vit_jax.weights import load_weights

        return load_weights
    raise AttributeError(f"module 'vit_jax' has no attribute {name!r}")
