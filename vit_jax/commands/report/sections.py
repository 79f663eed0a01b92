"""The sections of the report, each of which adds its figures and tables to a Page."""

import itertools
import shlex
from html import escape
from pathlib import Path

import numpy as np
import optax

from vit_jax import config as config_lib
from vit_jax.commands.report import figures
from vit_jax.commands.report.records import NOT_EXPERIMENTAL
from vit_jax.inference import attention, scores
from vit_jax.inference.classify import make_classify, patch_grid
from vit_jax.model import sincos2d
from vit_jax.workdir import format_duration

MAX_CLASSES_SHOWN = 20
_NUM_MISTAKES = 12
_NUM_ROLLOUTS = 8


def add_notices(page, records, run):
    """Adds a notice for each seed that stopped or is unfinished, and for a run of several seeds."""
    for record in records:
        name = run if len(records) == 1 else f"{run}, seed {record.config.seed}"
        if record.result is None:
            page.notice(_progress(name, record))
    if len(records) > 1:
        seeds = ", ".join(str(r.config.seed) for r in records)
        page.notice(
            f"{run} has {len(records)} seeds ({seeds}). Curves show all of them; the sections "
            f"about the model show seed {records[0].config.seed}."
        )


def _progress(name, record):
    # A run stopped by a bad loss keeps the batch; it may have resumed past an earlier one.
    steps = [p.stem.rpartition("_")[2] for p in record.workdir.glob("bad_batch_*.npz")]
    steps = [int(s) for s in steps if s.isdigit() and int(s) >= record.last_step]
    if steps:
        step = min(steps)
        return f"{name} diverged at step {step:,}. The batch is in bad_batch_{step}.npz."
    epochs = len(record.series("epoch/loss")[0])
    return (
        f"{name} is incomplete or still training: last logged step {record.last_step:,}, "
        f"{epochs} epochs finished of {_length(record.config)}."
    )


def _length(config):
    return f"{config.steps:,} steps" if config.steps else f"{config.epochs:g} epochs"


def summary(config):
    """Returns one line with the dataset, the duration, and the batch size of a run."""
    return f"{config.data.name} · {_length(config)}, batch size {config.batch_size}"


def headline(records, evaluation):
    """Returns the (value, label) pairs at the top of the page; `evaluation` may be None."""
    cards = []
    accuracy = _results(records, "test_accuracy")
    result = evaluation and evaluation.scores
    if len(accuracy) > 1:
        cards.append((_percent(accuracy), f"test accuracy, {len(accuracy)} seeds"))
    elif result:
        low, high = result["accuracy_interval"]
        label = f"accuracy on {evaluation.split} ({low:.1%} to {high:.1%})"
        cards.append((f"{result['accuracy']:.2%}", label))
    elif len(accuracy):
        cards.append((_percent(accuracy), "test accuracy"))
    if result:
        cards += [(f"{result['loss']:.3f}", "loss"), (f"{result['ece']:.1%}", "calibration error")]
    finished = next((r.result for r in records if r.result), None)
    if finished:
        cards += [(f"{finished['num_params'] / 1e6:.2f} M", "parameters")]
        cards += [(format_duration(finished["seconds"]), f"training on {finished['device']}")]
    else:
        cards.append((f"{records[0].last_step:,}", "last step"))
    return cards


def add_comparison(page, groups):
    """Adds results with mean and standard deviation over seeds, and differing config fields."""
    page.section("Comparison", "Mean and standard deviation over seeds, at the final step.")
    head = ("run", "seeds finished", "test accuracy", "test loss", "val accuracy", "train loss")
    rows = [_comparison_row(name, records) for name, records in groups]
    page.table("Results", (*head, "parameters", "images/s"), rows)
    configs = [records[0].config for _, records in groups]
    differing = []
    for field in config_lib.FIELDS:
        values = [config_lib.get_field(c, field) for c in configs]
        if field not in NOT_EXPERIMENTAL and any(v != values[0] for v in values):
            differing.append([field, *map(repr, values)])
    if differing:
        page.table("Differing config fields", ("field", *(n for n, _ in groups)), differing)


def _comparison_row(name, records):
    result = next((r.result for r in records if r.result), None)
    rate = result and result["images_per_second"]
    return [
        name,
        f"{sum(r.result is not None for r in records)} of {len(records)}",
        _percent(_results(records, "test_accuracy")),
        _mean_and_std(_results(records, "test_loss")),
        _percent(_results(records, "val_accuracy")),
        _mean_and_std(_results(records, "train_loss")),
        f"{result['num_params']:,}" if result else "–",
        f"{rate:,.0f}" if rate else "–",
    ]


def _results(records, name):
    """Returns float64[seeds]: a field of result.json, for the seeds that have it."""
    return np.array([r.result[name] for r in records if r.result and name in r.result], np.float64)


def _mean_and_std(values):
    """Formats '0.5708', or '0.5708 ± 0.0031' for several values."""
    std = f" ± {values.std(ddof=1):.4f}" if len(values) > 1 else ""
    return f"{values.mean():.4f}{std}" if len(values) else "–"


def _percent(values):
    """Formats '80.09%', or '80.09 ± 0.21%' for several values."""
    std = f" ± {100 * values.std(ddof=1):.2f}" if len(values) > 1 else ""
    return f"{100 * values.mean():.2f}{std}%" if len(values) else "–"


def add_curves(page, groups):
    """Adds loss, accuracy, learning rate, throughput, and gradient norm over the steps."""
    page.section("Curves")
    kinds = [("thin", "train", "one batch"), ("dots", "epoch", "train, epoch mean")]
    kinds += [("dashed", "val", "validation"), ("star", "test", "test, final step")]
    for name in ("loss", "accuracy"):
        series = _series(
            groups, *((f"{group}/{name}", label, style) for style, group, label in kinds)
        )
        if series:
            caption = f"{name.title()} over training."
            if name == "accuracy":
                caption += " Training accuracy is measured on augmented images."
            figure = figures.curves(series, ylabel=name, percent=name == "accuracy")
            page.figure(name, name.title(), figure, caption)
    for metric, title, ylabel, caption in (
        ("train/lr", "Learning rate", "learning rate", "As applied by the optimizer."),
        (
            *("time/images_per_second", "Throughput", "images/s"),
            "Training only, without compilation, evaluation, and saving.",
        ),
        ("train/grad_norm", "Gradient norm", "L2 norm", "Over all parameters, before clipping."),
    ):
        series = _series(groups, (metric, "", "line"))
        if series:
            log = metric == "train/grad_norm"
            figure = figures.curves(series, ylabel=ylabel, log=log)
            page.figure(title.lower().replace(" ", "_"), title, figure, caption)


def _series(groups, *lines):
    """Returns (metric, label, style) lines for `figures.curves`, colored by run or line."""
    several, series, labeled = len(groups) > 1, [], set()
    for i, (name, records) in enumerate(groups):
        for record, (j, (metric, label, style)) in itertools.product(records, enumerate(lines)):
            steps, values = record.series(metric)
            if not steps or (several and style == "thin"):
                continue
            text = " · ".join(filter(None, (name if several else "", label)))
            color = i if several else j
            series.append((None if text in labeled else text, color, style, steps, values))
            labeled.add(text)
    return series


def add_evaluation(page, evaluation, step):
    """Adds the confusion matrix, per-class accuracy, calibration, and worst mistakes."""
    result = evaluation.scores
    names = [c["class"] for c in result["classes"]]
    low, high = result["accuracy_interval"]
    page.section(
        "Evaluation",
        f"Step {step:,} on {escape(evaluation.split)}, {result['count']:,} images: accuracy "
        f"<b>{result['accuracy']:.2%}</b> (95% interval {low:.2%} to {high:.2%}), "
        f"loss {result['loss']:.4f}, expected calibration error {result['ece']:.2%}.",
    )
    confusion = np.array(result["confusion"])
    mistakes = confusion - np.diag(np.diag(confusion))
    classes = [c for c in result["classes"] if c["count"]]
    shown, note = np.arange(len(names)), ""
    if len(names) > MAX_CLASSES_SHOWN:
        worst = np.argsort(-(mistakes.sum(axis=0) + mistakes.sum(axis=1)), kind="stable")
        shown = np.sort(worst[:MAX_CLASSES_SHOWN])
        classes = sorted(classes, key=lambda c: c["accuracy"])[:MAX_CLASSES_SHOWN]
        note = f" Shows the {MAX_CLASSES_SHOWN} of {len(names)} classes with the most mistakes."
    figure = figures.confusion(confusion[np.ix_(shown, shown)], [names[i] for i in shown])
    page.figure("confusion", "Confusion", figure, f"Rows: true class; columns: prediction.{note}")
    figure = figures.class_accuracy(classes, result["accuracy"])
    page.figure("class_accuracy", "Accuracy by class", figure, f"With 95% Wilson intervals.{note}")
    _add_confidence(page, evaluation, names)


def _add_confidence(page, evaluation, names):
    labels, predicted = evaluation.labels, evaluation.logits.argmax(axis=1)
    confidence = np.exp(scores.log_softmax(evaluation.logits).max(axis=1))
    page.figure(
        "calibration",
        "Calibration",
        figures.calibration(scores.reliability(confidence, predicted == labels)),
        f"Expected calibration error over {scores.NUM_BINS} bins (Guo et al. 2017). Below the "
        "diagonal, the model is overconfident.",
    )
    wrong = np.flatnonzero(predicted != labels)
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:_NUM_MISTAKES]
    if len(worst):
        captions = [
            (f"{names[predicted[i]]} {confidence[i]:.0%}", f"is {names[labels[i]]}") for i in worst
        ]
        page.figure(
            "mistakes",
            "Most confident mistakes",
            figures.pictures(evaluation.images_at(worst), captions),
            "Prediction and confidence; below, the label.",
        )


def add_attention(page, trained, images, captions):
    """Adds attention maps, rollouts, and attention distances.

    Args:
      page: the Page.
      trained: a TrainedModel.
      images: uint8[N, H, W, C].
      captions: two short texts per image.
    """
    grid, patch = patch_grid(trained), trained.model.patch_size
    _, maps = make_classify(trained, batch_size=8, attention=True)(images)
    has_token = maps.shape[-1] > grid[0] * grid[1]
    source = "From the class token" if has_token else "Mean over all patches"
    page.section("Attention", f"{source}, taken from the forward pass of the model itself.")
    _add_heads(page, trained.model, images, maps, grid, captions)
    rollouts = [attention.rollout(m) for m in maps[:_NUM_ROLLOUTS]]
    weights = attention.attention_received(np.stack(rollouts), grid)
    pairs = [
        tile
        for image, weight in zip(images, weights, strict=False)
        for tile in (attention.thumbnail(image, 64), attention.overlay(image, weight, 64))
    ]
    pair_captions = [words for caption in captions for words in (caption, ("", ""))][: len(pairs)]
    page.figure(
        "rollout",
        "Attention rollout",
        figures.pictures(pairs, pair_captions),
        "How much each patch contributes to the prediction, over all layers (Abnar and Zuidema "
        "2020).",
    )
    distances, second = attention.distance(maps, grid, patch).mean(axis=0), None
    caption = f"Mean distance between a patch and what it attends to, over {len(images)} images."
    if has_token:
        received = attention.attention_received(maps, grid)
        spread = attention.spread(received, patch).mean(axis=0)
        second = ("from patches", "class token, from its center", spread)
        caption += " The class token has no position: it shows the spread around the center."
    figure = figures.by_layer(distances, ylabel="pixels", second=second)
    page.figure("attention_distance", "Attention distance", figure, caption)


def _add_heads(page, model, images, maps, grid, captions):
    wide = model.num_heads > 6
    for i in range(min(2 if wide else 4, len(images))):
        mosaic = attention.mosaic(images[i], maps[i], grid)
        page.figure(
            f"attention_{i + 1}",
            ", ".join(captions[i]),
            figures.attention(mosaic, model.depth, model.num_heads, attention.TILE, attention.GAP),
            "Brighter: more attention. Top row: the image and the rollout over all layers.",
            wide=wide,
        )


def add_weights(page, trained):
    """Adds patch filters, the similarity of position embeddings, and weight norms by layer."""
    model, params, _ = trained
    page.section("Weights")
    if model.stem == "patch":
        kernel = np.asarray(params["patch_embed"]["kernel"])
        filters = _patch_filters(kernel)
        page.figure(
            "filters",
            "Patch filters",
            figures.tiles(filters, columns=8),
            f"First {len(filters)} principal components of the {kernel.shape[-1]} filters "
            "(arXiv 2010.11929, figure 7).",
        )
    grid = patch_grid(trained)
    positions = (
        np.asarray(params["pos_embed"])
        if model.posemb == "learned"
        else sincos2d(grid, model.width, cls_token=False)
    )[0, -grid[0] * grid[1] :]
    positions = positions / np.maximum(np.linalg.norm(positions, axis=1, keepdims=True), 1e-12)
    similarity = (positions @ positions.T).reshape(-1, *grid)
    page.figure(
        "positions",
        "Position embeddings",
        figures.tiles(similarity, grid[1], span=(-1, 1), colorbar="cosine similarity"),
        "Each tile compares one patch's position embedding with all others.",
    )
    page.figure(
        "weight_norms",
        "Weight norms by layer",
        figures.bars(*_norms(params), xlabel="L2 norm"),
        "Over all parameters of a layer.",
    )


def _patch_filters(kernel):
    """Returns principal components of float[P, P, C, D] filters, in 0..1: [n, P, P(, 3)]."""
    P, _, C, D = kernel.shape
    components = np.linalg.svd(kernel.reshape(-1, D), full_matrices=False)[0].T[:32]
    filters = components.reshape(-1, P, P, C)
    filters = filters if C == 3 else filters.mean(axis=-1)
    largest = np.abs(filters).max(axis=tuple(range(1, filters.ndim)), keepdims=True)
    return 0.5 + 0.5 * filters / np.maximum(largest, 1e-12)


def _norms(params):
    """Returns (names, L2 norms) of the model's layers, from input to output."""
    blocks = sum(name.startswith("block_") for name in params)
    order = ("conv_stem", "patch_embed", "cls_token", "pos_embed")
    order += (*(f"block_{i}" for i in range(blocks)), "norm", "pre_logits", "head")
    names = [name for name in order if name in params]
    return names, [float(optax.tree.norm(params[name])) for name in names]


def add_identity(page, records):
    """Adds the command, commit, versions, devices, and duration, and the config."""
    page.section("This run")
    config, run = records[0].config, records[0].run
    seconds = _results(records, "seconds")
    processes = "process" if run["processes"] == 1 else "processes"
    devices = f"{len(run['devices'])} x {run['devices'][0]}"
    rows = [
        ("command", run["command"] or "called from Python"),
        ("commit", run["commit"] or "unknown"),
        ("started", run["date"]),
        ("training time", format_duration(seconds[0]) if len(seconds) else "incomplete"),
        ("devices", f"{devices}, {run['processes']} {processes}"),
        ("host", run["host"]),
        ("versions", ", ".join(f"{name} {version}" for name, version in run["versions"].items())),
    ]
    page.table("Provenance", (), rows)
    path, recipe = recipe_of(run["command"])
    title = f"Differences from {path}"
    if recipe is None:
        recipe = config_lib.defaults()
        title = f"Differences from the defaults ({path} is not in configs/)"
    values, expected = config_lib.flat(config), config_lib.flat(recipe)
    ignored = ("seed", "num_seeds") if len(records) > 1 else ()
    differing = [
        (name, repr(value), repr(expected[name]))
        for name, value in values.items()
        if value != expected[name] and name not in ignored
    ]
    if differing:
        page.table(title, ("field", "this run", "recipe"), differing)
    else:
        page.html(f"<p class=note>The config is {escape(str(path))} unchanged.</p>")
    page.html("<details class=wide><summary>All config fields</summary>")
    page.table("", (), [(name, repr(value)) for name, value in values.items()])
    page.html("</details>")


def recipe_of(command):
    """Returns (path of the recipe in a command, its config or None if configs/ lacks it).

    A recipe is a program. Only those in our own configs/ are run, never a path from a workdir.
    """
    try:
        words = shlex.split(command or "")
    except ValueError:  # unbalanced quotes
        words = command.split()
    paths = [b for a, b in itertools.pairwise(words) if a == "--config"]
    paths += [w.removeprefix("--config=") for w in words if w.startswith("--config=")]
    path = Path(paths[-1] if paths else config_lib.DEFAULT_RECIPE)
    recipe = {p.stem: p for p in config_lib.CONFIGS.glob("*.py")}.get(path.stem)
    return path, config_lib.from_file(recipe) if recipe else None
