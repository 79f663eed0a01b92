"""Attention maps of a ViT as numbers and as images.

Shapes: L layers, h heads, N tokens (the class token first, if there is one), patches in a grid of
rows and columns. `classify.make_classify` takes the maps from the forward pass.
"""

import cv2
import numpy as np

TILE, GAP = 128, 4  # pixels, in `mosaic`


def rollout(maps):
    """Returns how much each input token contributes to each output token: float64[N, N].

    `maps` is float[L, h, N, N]. Heads are averaged, half of each layer is the residual connection,
    and layers are multiplied. Rows sum to 1. Source: Abnar and Zuidema, "Quantifying Attention Flow
    in Transformers" (arXiv 2005.00928), section 4.
    """
    reach = np.eye(maps.shape[-1])
    for layer in np.asarray(maps, np.float64).mean(axis=1):
        reach = (layer + np.eye(len(layer))) / 2 @ reach
    return reach


def attention_received(maps, grid):
    """Returns the attention that each patch receives: float[..., N, N] -> [..., rows, columns].

    It comes from the class token; in a model without one, it is the mean over all patches, because
    the head classifies their mean.
    """
    num_patches = grid[0] * grid[1]
    has_token = maps.shape[-1] > num_patches
    weights = maps[..., 0, 1:] if has_token else maps.mean(axis=-2)
    return weights.reshape(*weights.shape[:-1], *grid)


def distance(maps, grid, patch_size):
    """Returns the mean attention distance in pixels: float[..., N, N] -> [...].

    As in Dosovitskiy et al. (arXiv 2010.11929), figure 7: distances between patches weighted by
    attention and averaged over query patches; the class token has no position and is excluded.
    """
    num_patches = grid[0] * grid[1]
    maps = maps[..., -num_patches:, -num_patches:]
    positions = np.stack(np.mgrid[: grid[0], : grid[1]], axis=-1).reshape(num_patches, 2)
    pixels = np.linalg.norm(positions[:, None] - positions[None], axis=-1) * patch_size
    return ((maps * pixels).sum(axis=-1) / maps.sum(axis=-1)).mean(axis=-1)


def spread(weights, patch_size):
    """Returns the mean distance in pixels of attention from its center of mass: 0 for one patch.

    `weights` is float[..., rows, columns] from `attention_received`; the result has shape [...].
    """
    rows, columns = weights.shape[-2:]
    positions = np.stack(np.mgrid[:rows, :columns], axis=-1).reshape(-1, 2) * patch_size
    weights = weights.reshape(*weights.shape[:-2], -1)
    weights = weights / weights.sum(axis=-1, keepdims=True)
    center = weights @ positions
    pixels = np.linalg.norm(positions - center[..., None, :], axis=-1)
    return (weights * pixels).sum(axis=-1)


def thumbnail(image, side):
    """Resizes uint8[H, W, C] to uint8[h, w, 3] whose longer side has `side` pixels."""
    H, W, _ = image.shape
    scale = side / max(H, W)
    size = (max(1, round(W * scale)), max(1, round(H * scale)))  # OpenCV's order
    image = np.broadcast_to(image, (H, W, 3)) if image.shape[2] == 1 else image[..., :3]
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
    return cv2.resize(np.ascontiguousarray(image), size, interpolation=method)


def overlay(image, weights, side):
    """Draws attention over an image: bright where the weight is large, relative to the largest.

    Args:
      image: uint8[H, W, C].
      weights: float[rows, columns], the attention that each patch receives.
      side: pixels of the result's longer side.
    Returns uint8[h, w, 3].
    """
    image = thumbnail(image, side)
    heat = np.asarray(weights, np.float32) / max(float(np.max(weights)), 1e-12)
    heat = cv2.resize(heat, image.shape[1::-1], interpolation=cv2.INTER_CUBIC)
    colors = cv2.applyColorMap(np.uint8(255 * np.clip(heat, 0, 1)), cv2.COLORMAP_INFERNO)
    return np.uint8(0.45 * image + 0.55 * colors[..., ::-1])


def mosaic(image, maps, grid):
    """Draws all attention maps of an image: uint8[height, width, 4], RGBA.

    The top row shows the image and the rollout; below it, each layer has a row with its heads.
    `image` is uint8[H, W, C], `maps` float[L, h, N, N].
    """
    flow = attention_received(rollout(maps), grid)
    rows = [[thumbnail(image, TILE), overlay(image, flow, TILE)]]
    for heads in attention_received(maps, grid):
        rows.append([overlay(image, head, TILE) for head in heads])
    columns = max(map(len, rows))
    H, W, _ = rows[0][0].shape
    page = np.zeros((len(rows) * (H + GAP) - GAP, columns * (W + GAP) - GAP, 4), np.uint8)
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            top, left = i * (H + GAP), j * (W + GAP)
            page[top : top + H, left : left + W] = np.dstack([tile, np.full((H, W), 255, np.uint8)])
    return page
