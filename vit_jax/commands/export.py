"""Write a run's weights for other libraries.

    vit.pt           the notebook's state_dict: load_state_dict(..., strict=True)
    vit.safetensors  our own names, any variant; its metadata defines the model
    vit.npz          the names of Google's vision_transformer
    vit.jax          a self-contained inference function: uint8 images to probabilities
    vit_folder       a Hugging Face folder: ViTForImageClassification.from_pretrained

--format timm writes a .safetensors or .pt with timm's names instead.
"""

import argparse
import pathlib
import sys

from vit_jax.errors import UserError
from vit_jax.inference.trained import load
from vit_jax.weights.save import FORMATS, save_weights

SUFFIXES = {  # formats by suffix, the default first
    ".pt": ("notebook", "timm"),
    ".safetensors": ("safetensors", "timm"),
    ".npz": ("google",),
    ".jax": ("jax",),
    "": ("huggingface",),
}


def parse_format(path, form):
    """Returns the requested format, or the suffix's. Raises UserError if they disagree."""
    suffix = pathlib.Path(path).suffix
    if suffix not in SUFFIXES:
        known = ", ".join(s for s in SUFFIXES if s)
        raise UserError(f"--to {path}: give a name that ends in {known}, or a folder")
    if form and form not in SUFFIXES[suffix]:
        own = ", ".join(s or "a folder" for s, forms in SUFFIXES.items() if form in forms)
        raise UserError(f"--format {form} is written to {own}, not to {path}")
    return form or SUFFIXES[suffix][0]


def main(argv=None):
    """Runs the command with the arguments in `argv` (default: sys.argv)."""
    parser = argparse.ArgumentParser(
        prog="vit-jax export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", required=True, help="directory of the run")
    parser.add_argument("--to", required=True, help="file or folder to create")
    parser.add_argument("--step", default="last", help="a saved step, best, or last (default)")
    parser.add_argument("--format", choices=FORMATS, help="default: from the suffix of --to")
    args = parser.parse_args(argv)
    form = parse_format(args.to, args.format)
    trained = load(args.workdir, args.step)
    print(f"Writing {args.to} ...", file=sys.stderr)
    save_weights(trained, args.to, form)
    print(f"{args.to}: step {trained.step} of {args.workdir}, as {form}")
