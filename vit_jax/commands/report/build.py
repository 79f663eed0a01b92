"""Builds the report of a run from its workdir, its checkpoint, and its data."""

import jax
import numpy as np

from vit_jax.commands.report import figures, page, sections
from vit_jax.commands.report.records import group_by_experiment, read_records
from vit_jax.errors import UserError, expand_home
from vit_jax.inference.classify import classify_examples, load_examples
from vit_jax.inference.trained import load
from vit_jax.workdir import write_errors, write_text


def write_report(workdir, *, compare=(), step="last", data=None, split=None):
    """Writes the report of a run to WORKDIR/report/index.html and returns its path.

    A run that is unfinished or diverged, or whose data is missing, gets the remaining sections and
    a notice. Raises UserError if a directory contains no run, or one of its files is corrupted.

    Args:
      workdir: the run's directory.
      compare: directories of other runs, shown in the results and the curves.
      step: the checkpoint to evaluate: a saved step, "best", or "last".
      data, split: what to evaluate on; see `inference.classify.load_examples`.
    """
    workdir, *compare = map(expand_home, (workdir, *compare))
    folders = (workdir, *compare)
    runs = [(n, read_records(f)) for n, f in zip(_names(folders), folders, strict=True)]
    _prepare_folder(workdir / "report")
    groups = group_by_experiment(runs)
    name, records = runs[0]
    with figures.style():
        parts = [
            *(sections.notices(r, run if compare else "This run") for run, r in runs),
            sections.results(groups),
            sections.curves(groups),
            _about_model(records[0].workdir, step, data, split),
            sections.robustness(records),
            sections.profile(records),
            sections.provenance(records),
        ]
    path = workdir / "report" / "index.html"
    with write_errors(path):
        write_text(path, page.render(name, parts))
    return path


def _names(folders):
    """Returns the shortest ends of the paths that tell the folders apart: seed_0, or a/seed_0."""
    paths = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(names):
            break
    return [_printable(name) for name in names]


def _printable(text):
    """Returns a text that every font can draw: lone surrogates (from paths) are escaped."""
    return text.encode(errors="backslashreplace").decode()


def _prepare_folder(folder):
    """Creates the folder. Raises UserError for a symbolic link, which could redirect a write."""
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for path in (folder, *folder.iterdir()):
        if path.is_symlink():
            raise UserError(f"{path} is a symbolic link: remove it to write the report")


def _about_model(workdir, step, data, split):
    """Returns the sections about the model, or a notice of the reason for their absence."""
    try:
        trained = load(workdir, step)
        if not all(np.isfinite(x).all() for x in jax.tree.leaves(trained.params)):
            raise UserError(f"the weights of step {trained.step:,} are not finite")
    except UserError as e:
        return page.notice(f"No model to evaluate: {e}.")
    weights = sections.weights(trained)
    try:
        examples, split = load_examples(trained, data, split)
        logits, labels = classify_examples(trained, examples)
    except UserError as e:
        return page.notice(f"Not evaluated: {e}.") + weights
    predictions = sections.Predictions(
        source=f"Step {trained.step:,} on {split}",
        class_names=[_printable(name) for name in trained.class_names],
        images_at=lambda rows: examples.examples(rows)[0],
        labels=labels,
        logits=logits,
    )
    return sections.evaluation(predictions) + sections.attention(trained, predictions) + weights
