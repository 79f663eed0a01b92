"""Vision Transformers in JAX. `vit_jax.load(workdir)` gives a trained model back."""

__version__ = "0.1.0"


def __getattr__(name):
    if name == "load":  # imported when first used: importing vit_jax stays light
        from vit_jax.loading import load

        return load
    raise AttributeError(f"module 'vit_jax' has no attribute {name!r}")
