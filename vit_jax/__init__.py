"""Vision Transformers in JAX. `vit_jax.load(workdir)` loads a trained model.

`vit_jax.load_weights(path)` reads weights from other libraries.
"""

__version__ = "0.1.0"


def __getattr__(name):
    if name == "load":  # imported on first use, to keep vit_jax light
        from vit_jax.inference.trained import load

        return load
    if name == "load_weights":
        from vit_jax.weights import load_weights

        return load_weights
    raise AttributeError(f"module 'vit_jax' has no attribute {name!r}")
