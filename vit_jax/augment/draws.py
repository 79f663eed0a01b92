"""Random draws, independent for each operation and each image of the global batch."""

import jax
import jax.numpy as jnp

# The number that each operation folds into the key. Never renumber: it would change every run.
CROP, FLIP, POLICY, JITTER, ERASE, MIX, MIX_BATCH = range(7)


def image_keys(key, operation, num_images):
    """Returns keys[B], one per image, for the operation with this number."""
    operation_key = jax.random.fold_in(key, operation)
    return jax.vmap(jax.random.fold_in, (None, 0))(operation_key, jnp.arange(num_images))


def uniform(keys, count):
    """Draws float32[B, count], uniform on [0, 1), from keys[B]."""
    return jax.vmap(lambda key: jax.random.uniform(key, (count,)))(keys)


def normal(keys, shape):
    """Draws float32[B, *shape], standard normal, from keys[B]; independent of `uniform`."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 1)
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def below(uniform, count):
    """Maps uniform draws on [0, 1) to integers int32, uniform on 0 .. count - 1.

    `uniform` is a JAX or NumPy array.
    """
    xp = uniform.__array_namespace__()
    return xp.floor(uniform * count).astype(xp.int32)
