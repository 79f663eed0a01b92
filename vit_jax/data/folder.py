"""Image folders: one subfolder per class, or one per split with class subfolders."""

import functools
import hashlib
import os
from pathlib import Path

from vit_jax.data.images import IMAGE_SUFFIXES, read_image
from vit_jax.data.source import Source, fingerprint, printable, user_cache, user_errors

_HELD_OUT = ("test", "testing", "val", "valid", "validation")
_SPLITS = ("train", "training", *_HELD_OUT)
_FIX = "use one subfolder of images per class, or one subfolder per split with class subfolders"


def open_folder(root: Path) -> Source:
    """Opens root/CLASS/*.png (the split "train") or root/SPLIT/CLASS/*.png.

    A split is named like its folder, such as "train" or "Testing". Raises UserError for a folder
    of another layout, or if a class has no images.
    """
    title = f"folder {printable(root)}"
    files = {}  # split -> [(path relative to root, label)]
    with user_errors(f"{title} cannot be used", _FIX):
        classes = {split: _subfolders(folder) for split, folder in _split_folders(root).items()}
        class_names = sorted({printable(p.name) for paths in classes.values() for p in paths})
        if not class_names:
            raise ValueError("no class folders")
        labels = {name: label for label, name in enumerate(class_names)}
        for split, paths in classes.items():
            files[split] = [
                (path.relative_to(root), labels[printable(class_folder.name)])
                for class_folder in paths
                for path in image_files(class_folder)
            ]
            # A hash of the path is the same on every machine, and mixes the classes in any slice.
            files[split].sort(key=lambda item: hashlib.sha256(os.fsencode(item[0])).digest())

    def read(split, index):
        path, label = files[split][index]
        where = printable(root / path)
        return where, read_image(root / path, where), label

    return Source(
        title=title,
        class_names=tuple(class_names),
        num_examples={split: len(items) for split, items in files.items()},
        cache_dir=user_cache(f"folder-{printable(root.name)}", root),
        fingerprint=lambda split: fingerprint(root, [p for p, _ in files[split]], class_names),
        reader=lambda split: functools.partial(read, split),
    )


def held_out_split(root: Path) -> str:
    """Returns the test split of an image folder, else its validation split, else its only one."""
    with user_errors(f"folder {printable(root)} cannot be used", _FIX):
        names = {name.lower(): name for name in _split_folders(root)}
    return next((names[name] for name in _HELD_OUT if name in names), next(iter(names.values())))


def _split_folders(root):
    """Returns {split: its folder of class folders}; {"train": root} if `root` has no splits."""
    subfolders = _subfolders(root)
    splits = {p.name: p for p in subfolders if p.name.lower() in _SPLITS and _subfolders(p)}
    others = [printable(p.name) for p in subfolders if p.name not in splits]
    if splits and others:
        raise ValueError(f"mixes the splits {', '.join(splits)} with {', '.join(others[:5])}")
    return splits or {"train": root}


def _subfolders(folder):
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def image_files(folder: Path) -> list[Path]:
    """Returns the image files below a folder, in no particular order.

    Skips hidden files and folders. Raises ValueError if there are no images, and OSError for a
    folder that cannot be read.
    """

    def stop(error):
        raise error  # by default, os.walk skips an unreadable folder

    paths = []
    for parent, subfolders, names in os.walk(folder, onerror=stop):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        paths += [
            Path(parent, name)
            for name in names
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
        ]
    if not paths:
        raise ValueError(f"{printable(folder)} has no images ({' '.join(IMAGE_SUFFIXES)})")
    return paths
