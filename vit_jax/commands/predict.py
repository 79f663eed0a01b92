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

import cv2
import numpy as np

from vit_jax import data
from vit_jax.errors import UserError, make_folder
from vit_jax.inference import attention
from vit_jax.inference.classify import make_classify, prepare
from vit_jax.inference.scores import log_softmax, top
from vit_jax.inference.trained import load
from vit_jax.model import patch_grid
from vit_jax.parallel import backend


def main(argv=None):
    """Runs the command with the arguments in `argv` (default: sys.argv)."""
    args = _parse(argv)
    if args.top < 1 or args.batch_size < 1:
        raise UserError("--top and --batch_size must be at least 1")
    backend.enable_compilation_cache()
    backend.check_backend()
    trained = load(args.workdir, args.step)
    if args.attention:
        make_folder(args.attention)
    paths = image_paths(args.images, sys.stdin)
    count = num_failed = 0
    for answer, error in _answers(trained, paths, args):
        count += 1
        if error:
            num_failed += 1
            print(f"error: {error}", file=sys.stderr)
        else:
            print(json.dumps(answer) if args.json else _as_line(answer), flush=True)
    if not count:
        raise UserError("no images given: pass files or folders, or paths on stdin with -")
    if num_failed:
        raise UserError(f"{num_failed} of {count} files could not be read")


def _parse(argv):
    parser = argparse.ArgumentParser(
        prog="vit-jax predict",
        description="Print the most probable classes of image files. A centered crop of each image "
        "goes through the model.",
    )
    parser.add_argument("--workdir", required=True, help="the run's directory")
    parser.add_argument("--step", default="last", help="a saved step, best, or last (default)")
    parser.add_argument("--top", type=int, default=3, help="classes to print per image")
    parser.add_argument("--batch_size", type=int, default=64, help="images per batch")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    parser.add_argument(
        "--attention",
        type=pathlib.Path,
        metavar="DIR",
        help="directory for attention images: the rollout, and every head of every layer",
    )
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE_OR_FOLDER",
        help="- reads paths from stdin, one per line",
    )
    return parser.parse_args(argv)


def image_paths(arguments, stdin):
    """Yields the image files that arguments name.

    An argument is a file, a folder (all images in it), or "-" (the lines of `stdin`). Raises
    UserError for a folder without images.
    """
    for argument in arguments:
        if argument == "-":
            lines = (line.rstrip("\r\n") for line in stdin)
            yield from (pathlib.Path(line) for line in lines if line)
            continue
        path = pathlib.Path(argument)
        if not path.is_dir():
            yield path
            continue
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in data.IMAGE_SUFFIXES)
        if not files:
            raise UserError(f"{path} contains no images ({' '.join(data.IMAGE_SUFFIXES)})")
        yield from files


def picture_name(path):
    """Returns a file name for the attention image of `path`, different for every path.

    It consists of the start of the file's name and a hash of the complete path.
    """
    name = re.sub(r"[^\w.-]+", "_", path.stem)[:40].strip("_.")
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    return f"{name}-{digest}.png"


def _answers(trained, paths, args):
    """Yields ({"image", "classes", and "attention" if requested}, None) or (None, error)."""
    with_attention = args.attention is not None
    classify = make_classify(trained, batch_size=args.batch_size, attention=with_attention)
    grid = patch_grid(trained.model, trained.image_shape)
    for batch in _batches(paths, trained.image_shape, args.batch_size):
        images = [image for _, image, error in batch if not error]
        if images:
            outputs = classify(np.stack(images))
            logits, maps = outputs if with_attention else (outputs, None)
            log_probabilities = log_softmax(logits)
        row = 0
        for path, image, error in batch:
            if error:
                yield None, error
                continue
            classes = top(log_probabilities[row], trained.class_names, args.top)
            answer = {"image": str(path), "classes": classes}
            if with_attention:
                answer["attention"] = str(args.attention / picture_name(path))
                _write_png(answer["attention"], attention.mosaic(image, maps[row], grid))
            row += 1
            yield answer, None


def _batches(paths, image_shape, size):
    """Yields lists of (path, image, error); threads decode the next batch meanwhile."""
    paths, pending = iter(paths), None
    with concurrent.futures.ThreadPoolExecutor() as pool:
        while True:
            batch = list(itertools.islice(paths, size))
            futures = [pool.submit(_read, path, image_shape) for path in batch]
            if pending:
                yield [future.result() for future in pending]
            if not batch:
                return
            pending = futures


def _read(path, image_shape):
    try:
        return path, prepare(data.read_image(path), image_shape), None
    except UserError as e:
        return path, None, str(e)


def _write_png(path, pixels):
    if not cv2.imwrite(path, cv2.cvtColor(pixels, cv2.COLOR_RGBA2BGRA)):
        raise UserError(f"cannot write {path}: check its directory and the free space")


def _as_line(answer):
    """Formats an answer: 'cat.png  cat 93.1%  dog 4.2%  deer 1.0%'."""
    classes = "  ".join(f"{c['class']:<10} {c['probability']:6.1%}" for c in answer["classes"])
    return f"{answer['image']}  {classes}"
