"""Image folders: one subfolder per class, or one per split with class subfolders."""

import functools
import hashlib
import os
from pathlib import Path

from vit_jax.data.images import IMAGE_SUFFIXES, read_image
from vit_jax.data.source import Source, fingerprint, one_line, printable, user_cache
from vit_jax.errors import UserError

_SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")


def open_folder(root: Path) -> Source:
    """Opens root/CLASS/*.png (the split "train") or root/SPLIT/CLASS/*.png.

    A split is named like its folder, such as "train" or "Testing". Images are ordered by a hash of
    their path relative to `root`, which mixes the classes.

    Raises UserError if the folder does not exist, mixes splits with other folders, or has no
    classes, or if a class has no images.
    """
    if not root.is_dir():
        raise UserError(
            f"folder {printable(root)} does not exist: use an image folder with one subfolder per"
            " class"
        )
    class_folders = {split: _subfolders(folder) for split, folder in _split_folders(root).items()}
    class_names = sorted({printable(p.name) for paths in class_folders.values() for p in paths})
    if not class_names:
        raise UserError(
            f"folder {printable(root)} has no class folders: put the images of each class into a"
            " subfolder"
        )
    files = {}  # split -> [(path relative to root, label)]
    for split, paths in class_folders.items():
        files[split] = [
            (path.relative_to(root), class_names.index(printable(class_folder.name)))
            for class_folder in paths
            for path in _image_files(class_folder)
        ]
        # A hash of the path is the same on every machine, and mixes the classes in any slice.
        files[split].sort(key=lambda item: hashlib.sha256(os.fsencode(item[0])).digest())

    def read(split, start, stop):
        for path, label in files[split][start:stop]:
            where = printable(root / path)
            yield where, functools.partial(read_image, root / path, where), label

    return Source(
        title=f"folder {printable(root)}",
        class_names=tuple(class_names),
        shard_lengths={split: [len(items)] for split, items in files.items()},
        cache_dirs=[user_cache(f"folder-{printable(root.name)}", root)],
        fingerprint=lambda split: fingerprint(root, [p for p, _ in files[split]], class_names),
        reader=lambda split: functools.partial(read, split),
    )


def _split_folders(root: Path) -> dict[str, Path]:
    """Returns {split: its folder of class folders}; {"train": root} if `root` has no splits."""
    subfolders = _subfolders(root)
    splits = [p for p in subfolders if p.name.lower() in _SPLITS and _subfolders(p)]
    others = [printable(p.name) for p in subfolders if p not in splits]
    if splits and others:
        raise UserError(
            f"folder {printable(root)} mixes the splits {', '.join(p.name for p in splits)} with"
            f" other folders ({', '.join(others[:5])}): move those elsewhere or, if all of them are"
            " classes, move them all into a folder named train"
        )
    return {p.name: p for p in splits} or {"train": root}


def _subfolders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _image_files(folder: Path) -> list[Path]:
    """Returns the image files below a folder, except hidden files and folders."""

    def stop(error):
        raise UserError(
            f"{printable(folder)} cannot be read ({one_line(error)}): make it readable or remove it"
        )

    paths = []
    for parent, subfolders, names in os.walk(folder, onerror=stop):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        paths += [
            Path(parent, name)
            for name in names
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
        ]
    if not paths:
        raise UserError(
            f"{printable(folder)} has no images ({' '.join(IMAGE_SUFFIXES)}): add some or remove it"
        )
    return paths
