"""Draws every augmentation of the device on the same eight images, one row per operation.

    python scripts/draw_augmentations.py --out docs/augmentations.png [--name cifar10]

Each operation has a larger magnitude than in a recipe, so that its effect is visible. The last rows
are complete policies as recipes use them.
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vit_jax import data
from vit_jax.augment import make_augment, pil
from vit_jax.config import defaults
from vit_jax.errors import run_command

SIDE, GAP, LABEL, NUM_IMAGES = 64, 4, 220, 8
KEY = 3  # any key works; with this one the mixup weight of the batch is far from 0 and 1

# Operation of pil.OPS -> magnitude.
MAGNITUDES = {
    "ShearX": 0.3,
    "ShearY": 0.3,
    "TranslateX": 10,
    "TranslateY": 10,
    "Rotate": 30,
    "Brightness": 0.9,
    "Color": 0.9,
    "Contrast": 0.9,
    "Sharpness": 0.9,
    "Posterize": 2,
    "Solarize": 100,
    "AutoContrast": 0,
    "Equalize": 0,
}
SIGNED = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", *list(MAGNITUDES)[5:9])

# Label -> fields of the `augment` config.
CONFIGS = {
    "crop pad, zero": dict(crop="pad", crop_padding=8),
    "crop pad, reflect": dict(crop="pad", crop_padding=8, crop_padding_mode="reflect"),
    "flip random": dict(flip="random"),
    "flip alternating, epoch 0": dict(flip="alternating"),
    "flip alternating, epoch 1": dict(flip="alternating"),
    "erasing": dict(erasing_prob=1.0),
    "mixup": dict(mixup_alpha=1.0),
    "cutmix": dict(cutmix_alpha=1.0),
    "RandAugment 2 x 9": dict(policy="randaugment"),
    "crop, flip, RandAugment,\nerasing, mixup or cutmix": dict(
        crop="pad",
        flip="random",
        policy="randaugment",
        erasing_prob=0.25,
        mixup_alpha=0.8,
        cutmix_alpha=1.0,
    ),
}


def augmented(images, mean, std, fields, *, epoch):
    """Augments uint8[B,H,W,C] with `fields` of the config set, and converts back to uint8."""
    group = defaults().augment
    group.update(fields)
    fn = jax.jit(make_augment(group, mean=mean, std=std, num_classes=NUM_IMAGES))
    batch = {
        "image": jnp.asarray(images),
        "label": jnp.arange(len(images)),
        "mask": jnp.ones(len(images), bool),
    }
    out, _ = fn(jax.random.key(KEY), batch, epoch=epoch)
    pixels = (np.asarray(out) * np.asarray(std) + np.asarray(mean)) * 255
    return np.clip(np.round(pixels), 0, 255).astype(np.uint8)


def rows(images):
    """Yields (label, uint8[B,H,W,C]) for each row of the picture."""
    # Mean and std of these images, so that erasing with zeros shows their mean color.
    pixels = images.reshape(-1, 3) / 255
    mean, std = pixels.mean(axis=0), pixels.std(axis=0)
    yield "original", images
    apply_ops = jax.jit(pil.apply_ops)
    for name, magnitude in MAGNITUDES.items():
        op = np.full(len(images), pil.OPS.index(name), np.int32)
        signs = np.where(np.arange(len(images)) % 2, -1, 1) if name in SIGNED else 1
        magnitudes = np.broadcast_to(np.float32(magnitude * signs), len(images))
        label = f"{name} {'+-' if name in SIGNED else ''}{magnitude}" if magnitude else name
        yield label, np.asarray(apply_ops(images, op, magnitudes))
    for label, fields in CONFIGS.items():
        yield label, augmented(images, mean, std, fields, epoch=int(label.endswith("epoch 1")))


def draw(images):
    """Draws all rows for uint8[B,H,W,3]; returns a PIL image."""
    lines = list(rows(images))
    step = SIDE + GAP
    page = Image.new("RGB", (LABEL + NUM_IMAGES * step, GAP + len(lines) * step), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=15)
    for r, (label, line) in enumerate(lines):
        top = GAP + r * step
        pen.text((10, top + SIDE / 2), label, fill="black", font=font, anchor="lm")
        for c, image in enumerate(line):
            tile = Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.NEAREST)
            page.paste(tile, (LABEL + c * step, top))
    return page


def main():
    """Writes the image."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write")
    parser.add_argument("--name", default="cifar10", help="dataset name, default cifar10")
    parser.add_argument(
        "--data-dir",
        help="dataset directory (default: $TFDS_DATA_DIR or ~/tensorflow_datasets)",
    )
    args = parser.parse_args()
    split = data.open_split(args.name, "test", data_dir=args.data_dir)
    # The first image of each class, up to NUM_IMAGES.
    first = np.unique(np.asarray(split.labels), return_index=True)[1][:NUM_IMAGES]
    page = draw(np.asarray(split.images)[first])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    # A palette of 256 colors makes the file a third of the size.
    page.quantize(256).save(args.out, optimize=True)
    print(f"{args.out}: {page.width} x {page.height}, {args.out.stat().st_size // 1000} kB")


if __name__ == "__main__":
    run_command(main)
