"""A vit_jax checkpoint restored with only orbax, jax, and numpy: no vit_jax, no target tree.

    python restore_elsewhere.py WORKDIR/checkpoints/STEP

`restore` reads a checkpoint, on any number of devices, whatever mesh the weights were trained on.
`predict` is the plain model and shows what every array is for: patches, a learned position
embedding, blocks, a class token or the mean of all tokens. Other variants are only in
vit_jax/model.py; `predict` raises ValueError for them.
"""

import json
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp


def restore(step_folder):
    """Returns (params, saved): a nested dict of float32 numpy arrays, and the checkpoint's JSON."""
    folder = pathlib.Path(step_folder).absolute()
    # The weights that were evaluated: the EMA weights if the run has them.
    item = "ema_params" if (folder / "ema_params").is_dir() else "params"
    params = ocp.StandardCheckpointer().restore(folder / item)
    return params, json.loads((folder / "config" / "metadata").read_text())


# The arrays that `predict` uses.
USED = re.compile(
    r"(patch_embed|norm|head|block_\d+/(norm1|norm2|attn/(qkv|out)|mlp/(fc1|fc2)))"
    r"/(kernel|bias|scale)|cls_token|pos_embed"
)


def check_plain(params, model):
    """Raises ValueError unless the model has the arrays that `predict` uses and no token shift."""
    if not {"patch_embed", "pos_embed"} <= params.keys():
        raise ValueError("this model has another stem or other positions: see vit_jax/model.py")
    if model.get("token_shift"):
        raise ValueError("this model has a token_shift: see vit_jax/model.py")
    for name, block in params.items():
        if name.startswith("block_") and {"norm1", "attn", "norm2", "mlp"} - block.keys():
            raise ValueError(f"{name} is not a plain block: see vit_jax/model.py")
    for path, _ in jax.tree.leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not USED.fullmatch(name):
            raise ValueError(f"this model also has {name}: see vit_jax/model.py")


def predict(params, saved, images):
    """Maps uint8[B, H, W, C] to float32[B, num_classes] probabilities."""
    model, pixels = saved["config"]["model"], saved["preprocessing"]
    check_plain(params, model)
    mean, std = np.float32(pixels["mean"]), np.float32(pixels["std"])
    x = (jnp.asarray(images, jnp.float32) / pixels["divide_by"] - mean) / std
    if size := model.get("image_size"):  # the model's own resolution, if it has one
        x = jax.image.resize(x, (len(x), size, size, x.shape[3]), "bilinear")

    def linear(x, p):
        return x @ p["kernel"] + p["bias"]

    def norm(x, p):
        x = x - x.mean(-1, keepdims=True)
        x = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + model["norm_eps"])
        return x * p["scale"] + p["bias"]

    kernel = params["patch_embed"]["kernel"]  # [P, P, C, D]
    P, _, C, D = kernel.shape
    B, H, W, _ = x.shape
    x = x.reshape(B, H // P, P, W // P, P, C).swapaxes(2, 3).reshape(B, -1, P * P * C)
    x = x @ kernel.reshape(-1, D) + params["patch_embed"]["bias"]
    if "cls_token" in params:
        x = jnp.concatenate([jnp.tile(params["cls_token"], (B, 1, 1)), x], axis=1)
    x = x + params["pos_embed"]  # [1, N, D], the class token first, then the patches row by row
    h = saved.get("num_heads") or model["num_heads"]
    for i in range(sum(name.startswith("block_") for name in params)):
        p = params[f"block_{i}"]
        qkv = linear(norm(x, p["norm1"]), p["attn"]["qkv"])  # [B, N, 3 D]: q, k, v; heads within
        q, k, v = qkv.reshape(B, -1, 3, h, D // h).transpose(2, 0, 3, 1, 4)
        weights = jax.nn.softmax(q @ k.swapaxes(2, 3) / (D // h) ** 0.5)
        y = (weights @ v).swapaxes(1, 2).reshape(B, -1, D)
        x = x + linear(y, p["attn"]["out"])
        y = linear(norm(x, p["norm2"]), p["mlp"]["fc1"])
        x = x + linear(jax.nn.gelu(y, model.get("gelu") == "tanh"), p["mlp"]["fc2"])
    x = norm(x, params["norm"])
    x = x[:, 0] if "cls_token" in params else x.mean(axis=1)
    return jax.nn.softmax(linear(x, params["head"]))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    params, saved = restore(sys.argv[1])
    black = np.zeros((1, *saved["image_shape"]), np.uint8)
    for name, p in zip(saved["class_names"], predict(params, saved, black)[0], strict=True):
        print(f"{p:.4f} {name}")
