"""Where a ViT looks: what its attention maps say, as numbers and as pictures.

Shapes: L layers, h heads, N tokens (the class token first, where there is one), patches in rows and
columns of a grid. The maps are those of the forward pass itself: see `classify.make_classify`.
"""

import cv2
import numpy as np

TILE, GAP = 128, 4  # pixels of `picture`


def rollout(maps):
    """float[L, h, N, N] -> float64[N, N]: how much each input token reaches each output token.

    Heads are averaged, the residual connection is half of every layer, and the layers multiply.
    Rows sum to 1. Source: Abnar and Zuidema, "Quantifying Attention Flow in Transformers" (arXiv
    2005.00928), section 4.
    """
    reach = np.eye(maps.shape[-1])
    for layer in np.asarray(maps, np.float64).mean(axis=1):
        reach = (layer + np.eye(len(layer))) / 2 @ reach
    return reach


def looked_at(maps, grid):
    """float[..., N, N] -> [..., rows, columns]: the attention that each patch gets.

    From the class token, the one that is classified; in a model without one from all patches, the
    mean of which is classified.
    """
    num_patches = grid[0] * grid[1]
    has_token = maps.shape[-1] > num_patches
    weights = maps[..., 0, 1:] if has_token else maps.mean(axis=-2)
    return weights.reshape(*weights.shape[:-1], *grid)


def distance(maps, grid, patch_size):
    """float[..., N, N] -> [...]: pixels from a patch to what it attends to, in the mean.

    As in Dosovitskiy et al. (arXiv 2010.11929), figure 7: distances between patches weighted by
    attention, averaged over the patches that ask; the class token has no place and is left out.
    """
    num_patches = grid[0] * grid[1]
    maps = maps[..., -num_patches:, -num_patches:]
    places = np.stack(np.mgrid[: grid[0], : grid[1]], axis=-1).reshape(num_patches, 2) * patch_size
    pixels = np.linalg.norm(places[:, None] - places[None], axis=-1)
    return ((maps * pixels).sum(axis=-1) / maps.sum(axis=-1)).mean(axis=-1)


def spread(weights, patch_size):
    """float[..., rows, columns] -> [...]: pixels from the attention's centre to where it lies.

    The mean distance of `looked_at` from its own centre of gravity: 0 for one patch alone.
    """
    rows, columns = weights.shape[-2:]
    places = np.stack(np.mgrid[:rows, :columns], axis=-1).reshape(-1, 2) * patch_size
    weights = weights.reshape(*weights.shape[:-2], -1)
    weights = weights / weights.sum(axis=-1, keepdims=True)
    centre = weights @ places
    pixels = np.linalg.norm(places - centre[..., None, :], axis=-1)
    return (weights * pixels).sum(axis=-1)


def plain(image, side):
    """uint8[H, W, C] -> uint8[h, w, 3], the longer side `side` pixels."""
    H, W, _ = image.shape
    scale = side / max(H, W)
    size = (max(1, round(W * scale)), max(1, round(H * scale)))  # OpenCV's order
    image = np.broadcast_to(image, (H, W, 3)) if image.shape[2] == 1 else image[..., :3]
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
    return cv2.resize(np.ascontiguousarray(image), size, interpolation=method)


def overlay(image, weights, side):
    """uint8[H, W, C] under float[rows, columns] -> uint8[h, w, 3]: bright where it looks.

    The largest weight is brightest; the image stays visible beneath.
    """
    image = plain(image, side)
    heat = np.asarray(weights, np.float32) / max(float(np.max(weights)), 1e-12)
    heat = cv2.resize(heat, image.shape[1::-1], interpolation=cv2.INTER_CUBIC)
    colours = cv2.applyColorMap(np.uint8(255 * np.clip(heat, 0, 1)), cv2.COLORMAP_INFERNO)
    return np.uint8(0.45 * image + 0.55 * colours[..., ::-1])


def picture(image, maps, grid):
    """uint8[rows, columns, 4] RGBA of one image uint8[H, W, C] and its maps float[L, h, N, N].

    The image and the rollout of all layers; beneath them a row of heads for each layer.
    """
    flow = looked_at(rollout(maps), grid)
    rows = [[plain(image, TILE), overlay(image, flow, TILE)]]
    for heads in looked_at(maps, grid):
        rows.append([overlay(image, head, TILE) for head in heads])
    columns = max(map(len, rows))
    H, W, _ = rows[0][0].shape
    page = np.zeros((len(rows) * (H + GAP) - GAP, columns * (W + GAP) - GAP, 4), np.uint8)
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            top, left = i * (H + GAP), j * (W + GAP)
            page[top : top + H, left : left + W] = np.dstack([tile, np.full((H, W), 255, np.uint8)])
    return page
