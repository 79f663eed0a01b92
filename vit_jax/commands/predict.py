"""Print the classes of image files."""

import argparse
import concurrent.futures
import hashlib
import itertools
import json
import os
import pathlib
import re
import sys

import numpy as np
from PIL import Image

from vit_jax import data
from vit_jax.errors import UserError, expand_home
from vit_jax.inference import attention
from vit_jax.inference.classify import make_classify, prepare
from vit_jax.inference.scores import log_softmax, top
from vit_jax.inference.trained import load
from vit_jax.model import patch_grid
from vit_jax.parallel import backend
from vit_jax.workdir import write_errors

BATCH_SIZE = 64
ATTENTION_BATCH_SIZE = 8  # at 384x384, the maps of a ViT-B/16 take 0.2 GB per image


def main(argv=None):
    """Runs the command with the arguments in `argv` (default: sys.argv)."""
    parser = argparse.ArgumentParser(
        prog="vit-jax predict",
        description="Print the most probable classes of image files. Each image is center-cropped "
        "and resized to the model's input size.",
    )
    parser.add_argument("--workdir", required=True, help="the run's directory")
    parser.add_argument("--step", default="last", help="a saved step, best, or last (default)")
    parser.add_argument("--top", type=int, default=3, help="classes to print per image")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    text = "directory for attention images: the rollout, and every head of every layer"
    parser.add_argument("--attention", type=expand_home, metavar="DIR", help=text)
    text = "image files or folders; - reads paths from stdin, one per line"
    parser.add_argument("images", nargs="+", metavar="IMAGE_OR_FOLDER", help=text)
    args = parser.parse_args(argv)
    if args.top < 1:
        raise UserError(f"--top {args.top}: use at least 1")
    backend.start_backend()
    trained = load(args.workdir, args.step)
    if args.attention:
        with write_errors(args.attention):
            args.attention.mkdir(parents=True, exist_ok=True)
    count = num_failed = 0
    for answer in _answers(trained, args):
        count += 1
        if isinstance(answer, UserError):
            num_failed += 1
            print(f"error: {answer}", file=sys.stderr)
        else:
            print(json.dumps(answer) if args.json else _as_line(answer), flush=True)
    if not count:
        raise UserError("no images given: pass files or folders, or paths on stdin with -")
    if num_failed:
        raise UserError(f"{num_failed} of {count} files could not be read")


def image_paths(arguments, stdin):
    """Yields the image files that arguments name: files, all images of folders, stdin's lines (-).

    Raises UserError for a folder without images.
    """
    for argument in arguments:
        path = pathlib.Path(argument)
        if argument == "-":
            lines = (line.rstrip("\r\n") for line in stdin)
            yield from (pathlib.Path(line) for line in lines if line)
        elif path.is_dir():
            with data.user_errors(f"{path} cannot be used", "pass image files or folders"):
                files = sorted(data.image_files(path))
            yield from files
        else:
            yield path


def _answers(trained, args):
    """Yields the UserError or {"image", "classes", "attention" if requested} of each path."""
    size = ATTENTION_BATCH_SIZE if args.attention else BATCH_SIZE
    classify = make_classify(trained, batch_size=size, attention=bool(args.attention))
    grid = patch_grid(trained.model, trained.image_shape)
    paths = image_paths(args.images, sys.stdin)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        while batch := list(itertools.islice(paths, size)):
            pixels = pool.map(_read, batch, itertools.repeat(trained.image_shape))
            images, errors = zip(*pixels, strict=True)
            outputs = classify(np.stack(images))
            logits, maps = outputs if args.attention else (outputs, None)
            log_probabilities = log_softmax(logits)
            for i, path in enumerate(batch):
                classes = top(log_probabilities[i], trained.class_names, args.top)
                answer = {"image": str(path), "classes": classes}
                if args.attention and not errors[i]:
                    picture = attention.mosaic(images[i], maps[i], grid)
                    answer["attention"] = _save(picture, args.attention, path)
                yield errors[i] or answer


def _read(path, image_shape):
    """Returns (the model's pixels, None), or (zeros, the UserError) for an unreadable file."""
    try:
        return prepare(data.read_image(path), image_shape), None
    except UserError as e:
        return np.zeros(image_shape, np.uint8), e


def _save(picture, folder, path):
    """Writes a picture under a name that differs for every `path`, and returns its path."""
    name = re.sub(r"[^\w.-]+", "_", path.stem)[:40].strip("_.")
    file = folder / f"{name}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:16]}.png"
    with write_errors(folder):
        Image.fromarray(picture).save(file)
    return str(file)


def _as_line(answer):
    """Formats an answer: 'cat.png  cat 93.1%  dog 4.2%  deer 1.0%'."""
    classes = "  ".join(f"{c['class']:<10} {c['probability']:6.1%}" for c in answer["classes"])
    return f"{answer['image']}  {classes}"
