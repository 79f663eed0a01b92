"""Write a run's weights for other libraries.

    vit.pt           the notebook's state_dict: load_state_dict(..., strict=True)
    vit.safetensors  our own names, any variant; its metadata defines the model
    vit.npz          the names of Google's vision_transformer
    vit.jax          a self-contained inference function: uint8 images to probabilities
    vit.onnx         the same for onnxruntime
    vit_folder       a Hugging Face folder: ViTForImageClassification.from_pretrained, and ready for
                     `hf upload`, with a model card made from the run

--format timm writes a .safetensors or .pt with timm's names instead.
"""

import argparse
import pathlib
import sys

from vit_jax import config as config_lib
from vit_jax.commands.report.records import read_result, read_run
from vit_jax.errors import UserError, expand_home
from vit_jax.inference.scores import wilson
from vit_jax.inference.trained import load
from vit_jax.weights.save import FORMATS, save_weights
from vit_jax.workdir import read_document

_CARD = """\
---
library_name: transformers
license: apache-2.0
pipeline_tag: image-classification
tags: [vit_jax, vision-transformer]
---

# {name}

A Vision Transformer, trained by vit_jax on {data}.

| | |
|---|---|
{rows}

The model has the same license as vit_jax; the data has its own.

## Recipe

The fields that differ from the defaults:

```text
{fields}
```

## Use

```python
from transformers import AutoImageProcessor, ViTForImageClassification

processor = AutoImageProcessor.from_pretrained("OWNER/{name}")
model = ViTForImageClassification.from_pretrained("OWNER/{name}")
logits = model(**processor(images, return_tensors="pt")).logits
```
"""

SUFFIXES = {  # formats by suffix, the default first
    ".pt": ("notebook", "timm"),
    ".safetensors": ("safetensors", "timm"),
    ".npz": ("google",),
    ".jax": ("jax",),
    ".onnx": ("onnx",),
    "": ("huggingface",),
}


def parse_format(path, form):
    """Returns the requested format, or the suffix's default. Raises UserError if they disagree."""
    suffix = pathlib.Path(path).suffix
    if suffix not in SUFFIXES:
        known = ", ".join(s for s in SUFFIXES if s)
        raise UserError(f"--to {path}: give a name that ends in {known}, or a folder")
    if form and form not in SUFFIXES[suffix]:
        own = ", ".join(s or "a folder" for s, forms in SUFFIXES.items() if form in forms)
        raise UserError(f"--format {form} is written to {own}, not to {path}")
    return form or SUFFIXES[suffix][0]


def model_card(trained, workdir):
    """Returns the model card of a run as Markdown: data, results, command, and recipe."""
    c, folder = trained.config, workdir / "checkpoints" / str(trained.step)
    splits = read_document(folder, "data")["splits"]
    counts = [f"{s['num_examples']:,} {name} images" for name, s in splits.items()]
    rows = {"step": f"{trained.step:,}", "classes": ", ".join(trained.class_names)}
    result, run = read_result(workdir / "result.json") or {}, read_run(workdir / "run.json")
    for name, split in splits.items():
        accuracy, count = result.get(f"{name}_accuracy"), split["num_examples"]
        if accuracy is not None and result.get("steps") == trained.step:
            low, high = wilson(round(accuracy * count), count)
            rows[f"{name} accuracy"] = f"{accuracy:.2%} (95% interval {low:.2%} to {high:.2%})"
    rows |= {name: run[name] for name in ("command", "commit", "date") if run.get(name)}
    fields = config_lib.flat(c).items()
    rows["weights"] = "exponential moving average" if c.optim.ema_decay else "not averaged"
    return _CARD.format(
        name=workdir.resolve().name,
        data=f"{c.data.name} ({', '.join(counts)})",
        rows="\n".join(f"| {name} | {text} |".replace("\n", " ") for name, text in rows.items()),
        fields="\n".join(f"{k} = {v!r}" for k, v in fields if v != config_lib.FIELDS[k].default),
    )


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
    card = model_card(trained, expand_home(args.workdir)) if form == "huggingface" else ""
    save_weights(trained, args.to, form, readme=card)
    heads = f", with {trained.model.num_heads} heads, which the file does not record"
    note = heads if form in ("notebook", "timm") else ""
    print(f"{args.to}: step {trained.step} of {args.workdir}, as {form}{note}")
