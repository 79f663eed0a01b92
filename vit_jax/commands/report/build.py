"""Builds the report of a run from its workdir, its checkpoint, and its data."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from vit_jax.commands.report import figures, sections
from vit_jax.commands.report.page import Page
from vit_jax.commands.report.records import group_by_experiment, read_records
from vit_jax.errors import UserError, expand_home
from vit_jax.inference import scores
from vit_jax.inference.examples import classify_examples, load_examples
from vit_jax.inference.trained import load

_NUM_ATTENTION_IMAGES = 32  # or one per class, up to twice as many


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A model's predictions on a split of N images."""

    images_at: Callable[[np.ndarray], np.ndarray]  # int[n] rows -> uint8[n, H, W, C]
    labels: np.ndarray  # int[N]
    logits: np.ndarray  # float32[N, classes]
    split: str
    scores: dict[str, Any]  # from `scores.score`; its class names can be printed and drawn


def write_report(workdir, *, compare=(), step="last", data=None, split=None):
    """Writes the report of a run to WORKDIR/report and returns the page's path.

    A run that is unfinished or diverged, or whose data is missing, gets the remaining
    sections and a notice.

    Args:
      workdir: the run's directory.
      compare: directories of other runs, shown in the curves and in tables.
      step: the checkpoint to evaluate: a saved step, "best", or "last".
      data, split: what to evaluate on; see `inference.examples.load_examples`.
    Raises:
      UserError: a directory contains no run, or one of its files is corrupted.
    """
    workdir, *compare = map(expand_home, (workdir, *compare))
    runs = [(printable(d.resolve().name), read_records(d)) for d in (workdir, *compare)]
    name, records = runs[0]
    page = Page(workdir / "report")
    page.prepare_folder()
    for run, its_records in runs:
        sections.add_notices(page, its_records, run if compare else "This run")
    with figures.style():
        groups = group_by_experiment(runs)
        if compare:
            sections.add_comparison(page, groups)
        sections.add_curves(page, groups)
        evaluation = _add_model(page, records[0].workdir, step, data, split)
        sections.add_identity(page, records)
    cards = sections.headline(records, evaluation)
    return page.write(name, sections.summary(records[0].config), cards)


def printable(text):
    """Returns a text that every font can draw: lone surrogates (from paths) are escaped."""
    return text.encode(errors="backslashreplace").decode()


def _add_model(page, workdir, step, data, split):
    """Adds the sections about the model. Returns its Evaluation, or None if there is none."""
    try:
        trained = load(workdir, step)
        if not all(np.isfinite(x).all() for x in jax.tree.leaves(trained.params)):
            raise UserError(f"the weights of step {trained.step:,} are not finite")
    except UserError as e:
        page.notice(f"No model to evaluate: {e}.")
        return None
    evaluation = None
    try:
        evaluation = _evaluate(trained, data, split)
    except UserError as e:
        page.notice(f"Not evaluated: {e}.")
    else:
        sections.add_evaluation(page, evaluation, trained.step)
        _add_attention(page, trained, evaluation)
    sections.add_weights(page, trained)
    return evaluation


def _evaluate(trained, data, split):
    examples, split = load_examples(trained, data, split)
    logits, labels, indices = classify_examples(trained, examples)
    names = [printable(name) for name in trained.class_names]
    return Evaluation(
        images_at=lambda rows: examples.examples(indices[rows])[0],
        labels=labels,
        logits=logits,
        split=split,
        scores=scores.score(logits, labels, names),
    )


def _add_attention(page, trained, evaluation):
    """Adds attention over the first image of each class, then over the first images."""
    labels, limit = evaluation.labels, _NUM_ATTENTION_IMAGES
    first = np.sort(np.unique(labels, return_index=True)[1])
    rest = np.setdiff1d(np.arange(min(limit, len(labels))), first)
    rows = np.concatenate([first, rest])[: 2 * limit]
    names = [c["class"] for c in evaluation.scores["classes"]]
    captions = [
        (names[labels[i]], f"predicted {names[evaluation.logits[i].argmax()]}") for i in rows
    ]
    sections.add_attention(page, trained, evaluation.images_at(rows), captions)
