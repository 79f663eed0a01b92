"""Classes of image files: python -m vit_jax.predict --workdir D IMAGE_OR_FOLDER...

Any image file that Pillow reads, of any size: its central square goes through the model. "-" reads
paths from standard input, one a line. With --attention DIR each image gets a picture of where the
model looks, as a whole (attention rollout) and in every head of every layer.
"""

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

from vit_jax import attention, data, mesh
from vit_jax.classify import make_classify, patch_grid, prepare
from vit_jax.errors import UserError, make_folder, run_command
from vit_jax.loading import load
from vit_jax.scores import log_softmax, top


def image_paths(arguments, stdin):
    """Yields the files that arguments name: files, all images in folders, lines of stdin for "-".

    Raises UserError for a path that does not exist and a folder without images.
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
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in data.IMAGE_SUFFIXES)
        if not found:
            raise UserError(f"{path} holds no images ({' '.join(data.IMAGE_SUFFIXES)})")
        yield from found


def read(path, image_shape):
    """(pixels as the model takes them, None), or (None, what is wrong with the file)."""
    try:
        return prepare(data.read_image(path), image_shape), None
    except UserError as e:
        return None, str(e)


def batches(paths, image_shape, size):
    """Yields ([path], [what `read` gave]); the next batch is decoded by threads meanwhile."""
    paths, ahead = iter(paths), None
    with concurrent.futures.ThreadPoolExecutor() as pool:
        while True:
            batch = list(itertools.islice(paths, size))
            reading = [pool.submit(read, path, image_shape) for path in batch]
            if ahead:
                yield ahead[0], [future.result() for future in ahead[1]]
            if not batch:
                return
            ahead = batch, reading


def picture_name(path):
    """A file name for the attention picture of an image, different for every path.

    The start of the image's own name, and a hash of the whole path.
    """
    name = re.sub(r"[^\w.-]+", "_", path.stem)[:40].strip("_.")
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    return f"{name}-{digest}.png"


def main():
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m vit_jax.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", required=True, help="the run's directory")
    parser.add_argument("--step", default="last", help="a saved step, best or last (default)")
    parser.add_argument("--top", type=int, default=3, help="classes to tell of each image")
    parser.add_argument("--batch_size", type=int, default=64, help="images at once")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    parser.add_argument("--attention", type=pathlib.Path, metavar="DIR", help="pictures go there")
    parser.add_argument("images", nargs="+", metavar="IMAGE_OR_FOLDER", help='"-": paths on stdin')
    args = parser.parse_args()
    if args.top < 1 or args.batch_size < 1:
        raise UserError("--top and --batch_size must be at least 1")
    mesh.keep_compiled()
    mesh.check_backend()
    loaded = load(args.workdir, args.step)
    classify = make_classify(
        loaded, batch_size=args.batch_size, attention=args.attention is not None
    )
    if args.attention:
        make_folder(args.attention)
    grid, told, failed = patch_grid(loaded), 0, 0
    paths = image_paths(args.images, sys.stdin)
    for batch, found in batches(paths, loaded.image_shape, args.batch_size):
        good = [i for i, (image, _) in enumerate(found) if image is not None]
        maps = None
        if good:
            images = np.stack([found[i][0] for i in good])
            logits = classify(images)
            if args.attention:
                logits, maps = logits
            logits = log_softmax(logits)
        for i, path in enumerate(batch):
            told += 1
            if i not in good:
                failed += 1
                print(f"error: {found[i][1]}", file=sys.stderr)
                continue
            row = good.index(i)
            answer = {"image": str(path), "classes": top(logits[row], loaded.class_names, args.top)}
            if maps is not None:
                answer["attention"] = str(args.attention / picture_name(path))
                pixels = attention.picture(images[row], maps[row], grid)
                pixels = cv2.cvtColor(pixels, cv2.COLOR_RGBA2BGRA)
                if not cv2.imwrite(answer["attention"], pixels):
                    raise UserError(f"cannot write {answer['attention']}")
            print(json.dumps(answer) if args.json else line(answer), flush=True)
    if not told:
        raise UserError("no image was named")
    if failed:
        raise UserError(f"{failed} of {told} files could not be read")


def line(answer):
    """'cat.png  cat 93.1%  dog 4.2%  deer 1.0%'."""
    classes = "  ".join(f"{c['class']:<10} {c['probability']:6.1%}" for c in answer["classes"])
    return f"{answer['image']}  {classes}"


if __name__ == "__main__":
    run_command(main)
