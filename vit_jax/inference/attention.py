"""Attention maps as images.

L layers, h heads, N tokens (the class token first, if there is one), patches in a grid of rows and
columns. `classify.make_classify` returns the maps.
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

    With a class token, only its attention counts; without one, the mean over all query patches.
    """
    has_class_token = maps.shape[-1] > grid[0] * grid[1]
    weights = maps[..., 0, 1:] if has_class_token else maps.mean(axis=-2)
    return weights.reshape(*weights.shape[:-1], *grid)


def thumbnail(image, side):
    """Resizes uint8[H, W, C] to uint8[h, w, 3] whose longer side has `side` pixels."""
    H, W, _ = image.shape
    scale = side / max(H, W)
    size = (max(1, round(W * scale)), max(1, round(H * scale)))  # OpenCV's order
    image = np.broadcast_to(image, (H, W, 3))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
    return cv2.resize(np.ascontiguousarray(image), size, interpolation=method)


def overlay(image, weights, side):
    """Draws float[rows, columns] attention over uint8[H, W, C], relative to the largest weight.

    Returns uint8[h, w, 3] whose longer side has `side` pixels.
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
    heads = [[overlay(image, h, TILE) for h in layer] for layer in attention_received(maps, grid)]
    return join_tiles([[thumbnail(image, TILE), overlay(image, flow, TILE)], *heads], GAP)


def join_tiles(rows, gap):
    """Joins rows of uint8[h, w, 3 or 1] tiles to uint8[H, W, 4], transparent in between."""
    h, w, _ = rows[0][0].shape
    columns = max(map(len, rows))
    page = np.zeros((len(rows) * (h + gap) - gap, columns * (w + gap) - gap, 4), np.uint8)
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            place = page[i * (h + gap) :, j * (w + gap) :][:h, :w]
            place[..., :3], place[..., 3] = tile, 255
    return page
