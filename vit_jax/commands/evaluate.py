"""vit-jax evaluate: accuracy of a trained model, with intervals, classes, and calibration."""

import argparse
import json

import numpy as np

from vit_jax.errors import expand_home
from vit_jax.inference.classify import classify_examples, load_examples
from vit_jax.inference.corruptions import corruption_errors
from vit_jax.inference.scores import score
from vit_jax.inference.trained import load
from vit_jax.parallel import backend
from vit_jax.workdir import write_errors, write_json


def main(argv=None):
    """Runs the command with the arguments in `argv` (default: sys.argv)."""
    parser = argparse.ArgumentParser(
        prog="vit-jax evaluate", description="Evaluate a run's weights on a split or image folder."
    )
    parser.add_argument("--workdir", required=True, help="the run's directory")
    parser.add_argument("--data", help="image folder or TFDS name (default: the run's)")
    parser.add_argument("--split", help="TFDS split (default: the test or validation split)")
    parser.add_argument("--step", default="last", help="a saved step, best, or last (default)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--corruptions",
        action="store_true",
        help="also evaluate on corrupted images; writes WORKDIR/corruptions.json for the report",
    )
    args = parser.parse_args(argv)
    backend.start_backend()
    trained = load(args.workdir, args.step)
    examples, split = load_examples(trained, args.data, args.split)
    errors = corruption_errors(trained, examples) if args.corruptions else {}
    logits, labels = classify_examples(trained, examples)
    result = score(logits, labels, trained.class_names)
    if errors:
        errors = {"clean": [1 - result["accuracy"]]} | errors
        result["corruption_errors"] = errors
    if args.json:
        print(json.dumps({"split": split, "step": trained.step, **result}))
    else:
        print(f"{split} of {examples.source}, step {trained.step}", *_table(result), sep="\n")
    if args.corruptions:  # after the output, in case the workdir cannot be written
        saved = {"split": split, "source": examples.source, "step": trained.step, "errors": errors}
        path = expand_home(args.workdir) / "corruptions.json"
        with write_errors(path):
            write_json(path, saved)


def _table(result):
    """Yields the lines of a table of `score`."""
    low, high = result["accuracy_interval"]
    yield (
        f"accuracy {result['accuracy']:.2%} (95% interval {low:.2%} to {high:.2%}), "
        f"loss {result['loss']:.4f}, ECE {result['ece']:.2%}, {result['count']:,} images"
    )
    if errors := result.get("corruption_errors"):
        yield f"\n{'error on corrupted images':25}   mean  at severities 1 to 5"
        for kind, each in errors.items():
            yield f"{kind:25} {np.mean(each):6.2%}  {' '.join(f'{e:6.2%}' for e in each)}"
    confusion = np.array(result["confusion"])
    np.fill_diagonal(confusion, 0)
    width = max(len("class"), *(len(c["class"]) for c in result["classes"]))
    yield f"\n{'class':{width}}  accuracy  95% interval       images  most confused with"
    for c, row in zip(result["classes"], confusion, strict=True):
        if not c["count"]:
            yield f"{c['class']:{width}}         -                          0"
            continue
        low, high = c["interval"]
        worst = np.argsort(-row, kind="stable")[:2]
        taken = ", ".join(f"{result['classes'][j]['class']} {row[j]}" for j in worst if row[j])
        yield (
            f"{c['class']:{width}}  {c['accuracy']:8.2%}  {low:7.2%} to {high:7.2%}  "
            f"{c['count']:6,}  {taken}"
        ).rstrip()
