"""The sections of the report: functions from a run's records or its model to HTML."""

import dataclasses
import itertools
from collections.abc import Callable

import cv2
import numpy as np

from vit_jax import config as config_lib
from vit_jax.commands.report import figures, page
from vit_jax.commands.report.records import NOT_EXPERIMENTAL
from vit_jax.inference import attention as attention_lib
from vit_jax.inference import scores
from vit_jax.inference.classify import make_classify
from vit_jax.model import patch_grid
from vit_jax.workdir import format_duration

_MAX_CLASSES_SHOWN = 20
_NUM_MISTAKES = 12
_NUM_OPERATIONS = 10
_NUM_ATTENTION_IMAGES = 4
# Columns of the results: field of result.json, scale, digits, unit.
_COLUMNS = {
    "test accuracy": ("test_accuracy", 100, 2, "%"),
    "test loss": ("test_loss", 1, 4, ""),
    "val accuracy": ("val_accuracy", 100, 2, "%"),
    "train loss": ("train_loss", 1, 4, ""),
    "parameters": ("num_params", 1, 0, ""),
    "images/s": ("images_per_second", 1, 0, ""),
}
# The curves of a plot: (group of the metric, label, style as in `figures.curves`).
_CURVES = (
    ("train", "one batch", "thin"),
    ("epoch", "train, epoch mean", "dots"),
    ("val", "validation", "dashed"),
    ("test", "test, final step", "star"),
)


def notices(records, run):
    """Returns a notice for each seed that stopped or is unfinished, and for a run of several."""
    if len(records) == 1:
        return _progress(run, records[0])
    seeds = [record.config.seed for record in records]
    several = (
        f"{run} has {len(records)} seeds ({', '.join(map(str, seeds))}). Curves show all of them; "
        f"any section about its model shows seed {seeds[0]}."
    )
    names = [f"{run}, seed {seed}" for seed in seeds]
    return "".join(map(_progress, names, records)) + page.notice(several)


def _progress(name, record):
    """Returns a notice of the step that an unfinished run reached, or "" if it has finished."""
    if record.result is not None:
        return ""
    last_step = max((line["step"] for line in record.lines), default=0)
    # A run stopped by a bad loss keeps the batch; it may have resumed past an earlier one.
    steps = [p.stem.removeprefix("bad_batch_") for p in record.workdir.glob("bad_batch_*.npz")]
    steps = [int(s) for s in steps if s.isdecimal() and int(s) >= last_step]
    if steps:
        step = min(steps)
        text = f"{name} diverged at step {step:,}. The batch is in bad_batch_{step}.npz."
        return page.notice(text)
    epochs, c = len(record.series("epoch/loss")[0]), record.config
    done = f" of {c.steps:,}" if c.steps else f", {epochs} of {c.epochs:g} epochs finished"
    return page.notice(
        f"{name} is incomplete or still training: last logged step {last_step:,}{done}."
    )


def results(groups):
    """Returns the results of each experiment, and the config fields in which they differ.

    A single experiment is compared with the defaults. `groups` is from `group_by_experiment`.
    """
    head = ("run", "seeds finished", *_COLUMNS)
    rows = [_result_row(name, records) for name, records in groups]
    configs = [(name, records[0].config) for name, records in groups]
    if len(groups) == 1:
        configs.append(("default", config_lib.defaults()))
    differing = []
    for field in config_lib.FIELDS:
        values = [config[field] for _, config in configs]
        if field not in NOT_EXPERIMENTAL and any(v != values[0] for v in values):
            differing.append([field, *map(_text, values)])
    title = "Fields that are not the default" if len(groups) == 1 else "Fields that differ"
    return page.section(
        "Results",
        page.table("At the final step", head, rows),
        page.table(title, ("field", *(n for n, _ in configs)), differing),
    )


def _text(value):
    """Returns a value of a config or of run.json as text."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "–" if value in ("", None) else str(value)


def _result_row(name, records):
    """Returns the cells of a row, such as '0.5708', or '80.09 ± 0.21%' for several seeds."""
    finished = [record.result for record in records if record.result is not None]
    row = [name, f"{len(finished)} of {len(records)}"]
    for field, scale, digits, unit in _COLUMNS.values():
        values = scale * np.array([result[field] for result in finished if field in result])
        std = f" ± {values.std(ddof=1):.{digits}f}" if digits and len(values) > 1 else ""
        row.append(f"{values.mean():,.{digits}f}{std}{unit}" if len(values) else "–")
    return row


def curves(groups):
    """Returns the loss, the accuracy, and the learning rate over the steps."""
    parts = []
    for name in ("loss", "accuracy", "learning rate"):
        lines = [(f"{group}/{name}", label, line) for group, label, line in _CURVES]
        if name == "learning rate":
            lines = [("train/lr", "", "line")]
        if series := _series(groups, lines):
            plot = page.plot(figures.curves(series, ylabel=name))
            parts.append(page.figure(name.capitalize(), plot))
    note = page.note("Augmentation, if any, applies to training images only.")
    return page.section("Curves", note, *parts) if parts else ""


def _series(groups, lines):
    """Returns the `series` of `figures.curves` for (metric, label, style) lines."""
    several, series, labeled = len(groups) > 1, [], set()
    for i, (name, records) in enumerate(groups):
        for record, (j, (metric, label, line)) in itertools.product(records, enumerate(lines)):
            steps, values = record.series(metric)
            if not steps or (several and line == "thin"):
                continue
            text = " · ".join(filter(None, (name if several else "", label)))
            color = i if several else j
            series.append((None if text in labeled else text, color, line, steps, values))
            labeled.add(text)
    return series


@dataclasses.dataclass(frozen=True)
class Predictions:
    """A model's predictions on N images."""

    source: str  # the checkpoint and the split
    class_names: list[str]  # can be printed and drawn
    images_at: Callable[[np.ndarray], np.ndarray]  # int[n] rows -> uint8[n, H, W, C]
    labels: np.ndarray  # int[N]
    logits: np.ndarray  # float32[N, classes]


def evaluation(predictions):
    """Returns the overall and per-class accuracy, the confusion matrix, and the worst mistakes."""
    result = scores.score(predictions.logits, predictions.labels, predictions.class_names)
    low, high = result["accuracy_interval"]
    summary = (
        f"{predictions.source}, {result['count']:,} images: accuracy {result['accuracy']:.2%} "
        f"(95% interval {low:.2%} to {high:.2%}), loss {result['loss']:.4f}, expected "
        f"calibration error {result['ece']:.2%}."
    )
    classes = sorted((c for c in result["classes"] if c["count"]), key=lambda c: c["accuracy"])
    rows = [
        (c["class"], f"{c['accuracy']:.2%}", "{:.2%} to {:.2%}".format(*c["interval"]), c["count"])
        for c in classes[:_MAX_CLASSES_SHOWN]
    ]
    return page.section(
        "Evaluation",
        page.note(summary),
        _confusion(np.array(result["confusion"]), predictions.class_names),
        _mistakes(predictions),
        page.table("Least accurate classes", ("class", "accuracy", "95% interval", "images"), rows),
    )


def _confusion(counts, names):
    mistakes = counts - np.diag(np.diag(counts))
    worst = np.argsort(-(mistakes.sum(axis=0) + mistakes.sum(axis=1)), kind="stable")
    shown = np.sort(worst[:_MAX_CLASSES_SHOWN])
    part, totals = counts[np.ix_(shown, shown)], counts.sum(axis=1)[shown]
    plot = page.plot(figures.confusion(part, [names[i] for i in shown], totals))
    caption = "Rows: true class; columns: prediction."
    if len(names) > len(shown):
        caption += f" Shows the {len(shown)} of {len(names)} classes with the most mistakes."
    return page.figure("Confusion", plot, caption)


def _mistakes(predictions):
    """Returns the images with the most confident wrong predictions, or "" if there are none."""
    names, labels = predictions.class_names, predictions.labels
    predicted = predictions.logits.argmax(axis=1)
    confidence = np.exp(scores.log_softmax(predictions.logits).max(axis=1))
    wrong = np.flatnonzero(predicted != labels)
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:_NUM_MISTAKES]
    if not len(worst):
        return ""
    captions = [f"{names[predicted[i]]} {confidence[i]:.0%}, is {names[labels[i]]}" for i in worst]
    gallery = page.gallery(predictions.images_at(worst), captions)
    caption = "The prediction, its confidence, and the label."
    return page.figure("Most confident mistakes", gallery, caption)


def attention(trained, predictions):
    """Returns the attention of all heads and layers on the first images of different classes."""
    model, names, labels = trained.model, predictions.class_names, predictions.labels
    rows = np.sort(np.unique(labels, return_index=True)[1])[:_NUM_ATTENTION_IMAGES]
    images = predictions.images_at(rows)
    _, maps = make_classify(trained, batch_size=len(rows), attention=True)(images)
    grid, parts = patch_grid(model, trained.image_shape), []
    for i, row in enumerate(rows):
        mosaic = page.picture(attention_lib.mosaic(images[i], maps[i], grid))
        title = f"{names[labels[row]]}, predicted {names[predictions.logits[row].argmax()]}"
        parts.append(page.figure(title, mosaic, wide=model.num_heads > 6))
    source = "the class token" if model.pool == "cls" else "all patches, on average"
    note = (
        f"Attention of {source}; brighter is more. Top row: the image, and the rollout over all "
        "layers (arXiv 2005.00928). Then one row per layer, with one image per head."
    )
    return page.section("Attention", page.note(note), *parts)


def weights(trained):
    """Returns the patch filters and the similarity of learned position embeddings."""
    model, params, _ = trained
    parts = []
    if model.stem == "patch":
        filters = _tiles(_patch_filters(params["patch_embed"]["kernel"]), columns=8)
        caption = "Principal components of the filters (arXiv 2010.11929, figure 7)."
        parts.append(page.figure("Patch filters", filters, caption))
    if model.posemb == "learned":
        rows, columns = patch_grid(model, trained.image_shape)
        positions = params["pos_embed"][0, -rows * columns :]
        norms = np.linalg.norm(positions, axis=1, keepdims=True)
        positions = positions / np.maximum(norms, 1e-12)
        similarity = np.uint8(127.5 + 127.5 * np.clip(positions @ positions.T, -1, 1))
        colors = cv2.applyColorMap(similarity, cv2.COLORMAP_VIRIDIS)[..., ::-1]
        tiles = _tiles(colors.reshape(-1, rows, columns, 3), columns)
        caption = (
            "Each tile compares one patch's position embedding with all others. Cosine "
            "similarity: -1 is dark purple, 0 is teal, and 1 is yellow."
        )
        parts.append(page.figure("Position embeddings", tiles, caption))
    return page.section("Weights", *parts)


def _tiles(images, columns):
    """Returns uint8[n, h, w, 3 or 1] images as one picture, row by row."""
    rows = [images[start : start + columns] for start in range(0, len(images), columns)]
    return page.picture(attention_lib.join_tiles(rows, gap=1))


def _patch_filters(kernel):
    """Returns principal components of float[P, P, C, D] filters as uint8[n, P, P, 3 or 1]."""
    P, _, C, D = kernel.shape
    components = np.linalg.svd(kernel.reshape(-1, D), full_matrices=False)[0].T[:32]
    filters = components.reshape(-1, P, P, C)
    if C != 3:
        filters = filters.mean(axis=-1, keepdims=True)
    largest = np.abs(filters).max(axis=(1, 2, 3), keepdims=True)
    return np.uint8(127.5 + 127.5 * filters / np.maximum(largest, 1e-12))


def robustness(records):
    """Returns the error on corrupted images by severity, or "" without corruptions.json."""
    saved = records[0].corruptions
    if not saved:
        return ""
    note = (
        f"Error on {saved.get('split')} of {saved.get('source')}, step {saved.get('step')}. "
        "vit_jax draws the corruptions, with the severities of Hendrycks and Dietterich "
        "(arXiv 1903.12261). Severity 0 is the original images."
    )
    plot = page.plot(figures.severities(saved["errors"]))
    return page.section("Robustness", page.note(note), page.figure("Corruptions", plot))


def profile(records):
    """Returns the longest operations of a profiled run, or "" without a profile."""
    operations = records[0].operations
    if not operations:
        return ""
    rows = [
        (str(row.get("operation")), f"{row['milliseconds']:.3f}", f"{row['times']:g}")
        for row in operations[:_NUM_OPERATIONS]
    ]
    total = sum(row["milliseconds"] for row in operations)
    note = (
        f"Time of each operation per step; all operations together take {total:,.1f} ms. The "
        "blocks of the model share a row, and concurrent operations each count in full. Open the "
        "folder profile in TensorBoard, or its .trace.json.gz in Perfetto."
    )
    head = ("operation", "ms", "times")
    return page.section("Profile", page.note(note), page.table("Longest operations", head, rows))


def provenance(records):
    """Returns the content of run.json and the training time."""
    rows = [(field, _text(value)) for field, value in records[0].run.items()]
    if records[0].result and "seconds" in records[0].result:
        rows.append(("training time", format_duration(records[0].result["seconds"])))
    return page.section("Provenance", page.table("This run", ("field", "value"), rows))
