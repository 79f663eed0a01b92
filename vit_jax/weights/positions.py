"""Learned position embeddings resized to another grid of patches, by each source's method.

zoom      Corners map to corners, linear: scipy.ndimage.zoom(order=1), as in google-research's
          vision_transformer and big_vision. For Google's .npz.
bicubic   torch.nn.functional.interpolate(mode="bicubic", align_corners=False), without
          antialiasing, as in transformers. For Hugging Face, and for timm (which antialiases; the
          only difference here).
bilinear  The same with mode="bilinear". For vit_jax's own weights and the notebook's.
"""

import numpy as np


def resize_positions(pos_embed, grid, new_grid, *, method, class_token):
    """Resizes float32[1, N, D] from a grid (rows, columns) to float32[1, N', D] for `new_grid`.

    With `class_token`, the first token is kept as is. `method` is one of the module's. Computes in
    float64.
    """
    first = int(class_token)
    kept, patches = pos_embed[:, :first], np.asarray(pos_embed[0, first:], np.float64)
    table = patches.reshape(*grid, -1)
    vertical, horizontal = (
        _matrix(old, new, method) for old, new in zip(grid, new_grid, strict=True)
    )
    table = np.einsum("ij,jkd->ikd", vertical, table)
    table = np.einsum("ij,kjd->kid", horizontal, table)
    table = table.reshape(1, new_grid[0] * new_grid[1], -1).astype(np.float32)
    return np.concatenate([kept, table], axis=1)


def _matrix(old, new, method):
    """Returns float64[new, old]: the weight of each old sample in each new one, along one axis."""
    i = np.arange(new, dtype=np.float64)
    if method == "zoom":  # corners map to corners
        at = i * ((old - 1) / max(new - 1, 1))
    elif method == "bilinear":  # edges map to edges, as in bicubic
        at = np.maximum((i + 0.5) * (old / new) - 0.5, 0)
    else:
        at = (i + 0.5) * (old / new) - 0.5
    base = np.floor(at).astype(int)
    t = at - base
    if method == "bicubic":  # Keys' kernel with a = -0.75, as in torch
        weights = {offset: _keys(np.abs(t - offset)) for offset in (-1, 0, 1, 2)}
    else:
        weights = {0: 1 - t, 1: t}
    matrix = np.zeros((new, old))
    for offset, weight in weights.items():
        np.add.at(matrix, (np.arange(new), np.clip(base + offset, 0, old - 1)), weight)
    return matrix


def _keys(x, a=-0.75):
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, far)
