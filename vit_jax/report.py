"""One page of pictures of a run: python -m vit_jax.report --workdir D [--compare D2 D3 ...].

Writes D/report/index.html, which needs nothing but itself, and each figure as PNG and SVG beside
it. Works on any run, also one that was interrupted, has diverged, or trains still; it says so.
"""

import argparse
import dataclasses
import itertools
import json
import math
import shlex
import string
from html import escape
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vit_jax import attention, augment, evaluate, mesh, metrics, scores
from vit_jax import config as config_lib
from vit_jax.classify import make_classify, patch_grid
from vit_jax.errors import UserError, expand_home, make_folder, run_command
from vit_jax.loading import load
from vit_jax.model import sincos2d

try:
    from vit_jax import figures
except ImportError:  # matplotlib is an extra: `report` says so
    figures = None

TEMPLATE = Path(__file__).with_name("report.html")

MANY = 20  # classes that the confusion matrix and the accuracy by class can show
NUM_GRADIENT_IMAGES = 256
# Fields that do not make two runs different experiments.
ALIKE = ("seed", "num_seeds", "tensorboard", "wandb", "data.dir", "mesh.data", "mesh.fsdp")


@dataclasses.dataclass(frozen=True)
class Record:
    """What one seed of a run has written down."""

    workdir: Path
    config: Any
    run: dict  # run.json
    lines: list[dict]  # metrics.jsonl
    result: dict | None  # result.json; None: the run has not ended

    def series(self, name):
        """(steps, values) of a metric."""
        found = [(line["step"], line[name]) for line in self.lines if name in line]
        return tuple(zip(*found, strict=True)) if found else ((), ())

    @property
    def last_step(self):
        """The last that was logged."""
        return max((line["step"] for line in self.lines), default=0)


def printable(text):
    """Returns a text that every font can draw: lone surrogates (bytes of a path) are escaped."""
    return text.encode(errors="backslashreplace").decode()


def read_records(workdir):
    """Reads a run, one Record per seed.

    Raises UserError if a file is missing or unreadable, or a field is missing or of another type.
    """
    workdir = Path(workdir)
    config = _read_config(workdir)
    if config.num_seeds == 1:
        return [_read_record(workdir, config)]
    folders = sorted(workdir.glob("seed_*"))
    if not folders:
        raise UserError(f"{workdir} is a run of {config.num_seeds} seeds but contains no seed_N")
    records = [_read_record(folder, _read_config(folder)) for folder in folders]
    return sorted(records, key=lambda record: record.config.seed)


def _read_config(workdir):
    path = workdir / "config.json"
    if not path.exists():
        raise UserError(f"{workdir} contains no run ({path} is missing): train with this --workdir")
    try:
        return config_lib.from_dict(_read_object(path))
    except RecursionError as e:
        raise UserError(f"{path} is nested too deeply") from e


def _read_record(workdir, config):
    run = _read_object(workdir / "run.json")
    _check_fields(run, _RUN_FIELDS, workdir / "run.json")
    path, result = workdir / "result.json", None
    if path.exists():
        result = _read_object(path)
        _check_fields({**dict.fromkeys(_OPTIONAL_RESULTS, 0), **result}, _RESULT_FIELDS, path)
    path, lines = workdir / "metrics.jsonl", []
    if path.exists():
        lines = list(_read_metrics(path))
    return Record(workdir, config, run, lines, result)


def _read_object(path):
    """The object in a JSON file."""
    try:
        value = json.loads(path.read_text())
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is corrupted ({e}): restore it from a copy") from e
    if not isinstance(value, dict):
        raise UserError(f"{path} must contain a JSON object, not {type(value).__name__}")
    return value


def _check_fields(values, fields, path):
    """Raises UserError unless `values` has each of the fields, with a value of its kind."""
    for name, (is_valid, kind) in fields.items():
        if name not in values or not is_valid(values[name]):
            found = f"got {values[name]!r:.100}" if name in values else "it is missing"
            raise UserError(f"{name} in {path} must be {kind}; {found}")


def _read_metrics(path):
    """Yields the lines of a metrics.jsonl, every value a number."""
    try:
        for _, values in metrics.read_lines(path):
            _check_fields(values, dict.fromkeys(values, _NUMBER), path)
            yield values
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from e
    except ValueError as e:
        raise UserError(f"{path} is corrupted ({e}): restore it from a copy") from e


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def _is_text(value):
    return isinstance(value, str)


_NUMBER = _is_number, "a number"
_TEXT = _is_text, "a text"
_OPTIONAL_TEXT = (lambda v: v is None or _is_text(v)), "a text or null"
_RUN_FIELDS = {
    "command": _OPTIONAL_TEXT,
    "commit": _OPTIONAL_TEXT,
    "date": _TEXT,
    "host": _TEXT,
    "processes": _NUMBER,
    "versions": (lambda v: isinstance(v, dict) and all(map(_is_text, v.values())), "texts by name"),
    "devices": (lambda v: isinstance(v, list) and v and all(map(_is_text, v)), "a list of texts"),
}
_OPTIONAL_RESULTS = ("test_accuracy", "test_loss", "val_accuracy")  # without such a split: missing
_RESULT_FIELDS = {
    **dict.fromkeys((*_OPTIONAL_RESULTS, "train_loss", "seconds", "num_params"), _NUMBER),
    "images_per_second": (lambda v: v is None or _is_number(v), "a number or null"),
    "device": _TEXT,
}


def recipe_of(command):
    """(path of the recipe that a command names, its config or None where configs/ has none such).

    A recipe is a program: only our own are run, not what a workdir from elsewhere may name.
    """
    try:
        words = shlex.split(command or "")
    except ValueError:  # unbalanced quotes
        words = command.split()
    named = [b for a, b in itertools.pairwise(words) if a == "--config"]
    named += [w.removeprefix("--config=") for w in words if w.startswith("--config=")]
    path = Path(named[-1] if named else config_lib.DEFAULT_RECIPE)
    ours = {p.stem: p for p in config_lib.CONFIGS.glob("*.py")}.get(path.stem)
    return path, config_lib.from_file(ours) if ours else None


def states(records, run="This run"):
    """Sentences on what is unusual about a run: unfinished, diverged, short, of several seeds."""
    config, said = records[0].config, []
    for record in records:
        name = run if len(records) == 1 else f"{run}, seed {record.config.seed},"
        bad = [
            (line["step"], key)
            for line in record.lines
            for key, value in line.items()
            if not math.isfinite(value)
        ]
        if bad:
            step, key = min(bad)
            said.append(f"{name} diverged: {key} is not a finite number at step {step:,}.")
        # The batch that a run stopped at is kept beside its checkpoints; it may have gone on since.
        stopped = [p.stem.rpartition("_")[2] for p in record.workdir.glob("bad_batch_*.npz")]
        stopped = [int(s) for s in stopped if s.isdigit() and int(s) >= record.last_step]
        if stopped and record.result is None:
            said.append(
                f"{name} stopped at step {min(stopped):,}, diverged: its loss or gradient was not "
                f"finite. The batch is in bad_batch_{min(stopped)}.npz."
            )
        if record.result is None:
            ended = len(record.series("epoch/loss")[0])
            length = f"{config.steps:,} steps" if config.steps else f"{config.epochs:g} epochs"
            said.append(
                f"{name} is not complete: it was interrupted or is still training. Its last line "
                f"is of step {record.last_step:,}; {ended} epochs of its {length} have ended."
            )
    if records[0].result and len(records[0].series("epoch/loss")[0]) == 1:
        said.append(f"{run} is of a single epoch: its curves have one mean each.")
    if len(records) > 1:
        seeds = ", ".join(str(r.config.seed) for r in records)
        said.append(
            f"{run} is of {len(records)} seeds ({seeds}), trained in one program. Curves show "
            f"each; what looks into the model shows seed {records[0].config.seed}."
        )
    return said


def grouped(runs):
    """[(name, [Record])]: runs of one config up to its seed are one row of a comparison."""
    groups = []
    for name, records in runs:
        for other, members in groups:
            if not config_lib.difference(records[0].config, members[0].config, ignore=ALIKE):
                members.extend(records)
                other.append(name)
                break
        else:
            groups.append(([name], list(records)))
    return [(", ".join(names), records) for names, records in groups]


class Page:
    """The page as it grows: sections of figures, tables and notes."""

    def __init__(self, folder):
        self.folder, self.parts, self.sections = folder, [], []

    def section(self, title, note=""):
        """Starts a section."""
        name = title.lower().replace(" ", "-")
        self.end()
        self.sections.append((name, title))
        note = f"<p class=note>{note}</p>" if note else ""
        self.parts.append(f'<section id="{name}"><h2>{title}</h2>{note}<div class=grid>')

    def end(self):
        """Ends the open section."""
        if self.sections:
            self.parts.append("</div></section>")

    def figure(self, name, title, figure, caption, *, wide=False):
        """Adds a figure, and writes it beside the page."""
        drawing = figures.save(figure, self.folder, name)
        self.parts.append(
            f"<figure{' class=wide' if wide else ''}><h3>{escape(title)}</h3>"
            f"<div class=drawing>{drawing}</div><figcaption>{escape(caption)} "
            f'<span class=files><a href="{name}.png">PNG</a> <a href="{name}.svg">SVG</a></span>'
            "</figcaption></figure>"
        )

    def table(self, title, head, rows):
        """Adds a table; the first cell of a row is its name."""
        cells = "".join(f"<th scope=col>{escape(str(c))}</th>" for c in head)
        body = "".join(
            f"<tr><th scope=row>{escape(str(first))}</th>"
            + "".join(f"<td>{escape(str(c))}</td>" for c in rest)
            + "</tr>"
            for first, *rest in rows
        )
        head = f"<thead><tr>{cells}</tr></thead>" if any(head) else ""
        self.parts.append(
            f"<figure class=wide><h3>{escape(title)}</h3><div class=scroll>"
            f"<table>{head}<tbody>{body}</tbody></table></div></figure>"
        )


def add_curves(page, runs):
    """Loss, accuracy, learning rate, throughput and gradient norm of [(name, [Record])]."""
    several = len(runs) > 1

    def lines(*metrics):
        """[(metric, label, style)] -> figures.curves' series, a colour a run or else a metric."""
        found, labelled = [], set()
        for i, (name, records) in enumerate(runs):
            for record in records:
                for j, (metric, label, style) in enumerate(metrics):
                    steps, values = record.series(metric)
                    if not steps or (several and style == "thin"):
                        continue
                    text = " · ".join(filter(None, (name if several else "", label)))
                    colour = i if several else j
                    found.append((None if text in labelled else text, colour, style, steps, values))
                    labelled.add(text)
        return found

    page.section("Curves")
    kinds = [("thin", "train", "one batch"), ("dots", "epoch", "train, mean of an epoch")]
    kinds += [("dashed", "val", "validation"), ("star", "test", "test, at the end")]
    for what, percent in (("loss", False), ("accuracy", True)):
        series = lines(*((f"{group}/{what}", label, style) for style, group, label in kinds))
        if series:
            caption = f"{what.title()} over training"
            if what == "accuracy":
                caption += ". In training it is counted on augmented images, so it can lie below."
            page.figure(
                what, what.title(), figures.curves(series, ylabel=what, percent=percent), caption
            )
    rest = [
        ("train/lr", "Learning rate", "learning rate", "As applied."),
        (
            "time/images_per_second",
            "Throughput",
            "images a second",
            "Training only: compilation, evaluation and saving are left out.",
        ),
        (
            "train/grad_norm",
            "Gradient norm",
            "L2 norm",
            "Of all parameters together, before clipping.",
        ),
    ]
    for metric, title, ylabel, caption in rest:
        series = lines((metric, "", "line"))
        if series:
            name = title.lower().replace(" ", "_")
            log = metric == "train/grad_norm"
            page.figure(name, title, figures.curves(series, ylabel=ylabel, log=log), caption)


def add_evaluation(page, loaded, examples, labels, logits, result, split):
    """Confusions, classes, calibration and the most confident mistakes."""
    names = [c["class"] for c in result["classes"]]
    low, high = result["accuracy_interval"]
    page.section(
        "Evaluation",
        f"Step {loaded.step:,} on {escape(split)}, {result['count']:,} images, each "
        f"once: accuracy <b>{result['accuracy']:.2%}</b> (95% interval {low:.2%} to {high:.2%}), "
        f"loss {result['loss']:.4f}, expected calibration error {result['ece']:.2%}.",
    )
    confusion = np.array(result["confusion"])
    off = confusion - np.diag(np.diag(confusion))
    seen = [c for c in result["classes"] if c["count"]]
    shown, of_many = np.arange(len(names)), ""
    if len(names) > MANY:  # the classes with the most mistakes
        shown = np.sort(np.argsort(-(off.sum(axis=0) + off.sum(axis=1)), kind="stable")[:MANY])
        seen = sorted(seen, key=lambda c: c["accuracy"])[:MANY]
        of_many = f" The {MANY} of {len(names)} classes with the most mistakes."
    page.figure(
        "confusion",
        "Confusion",
        figures.confusion(confusion[np.ix_(shown, shown)], [names[i] for i in shown]),
        f"A row is a true class, a column what it was taken for.{of_many}",
    )
    page.figure(
        "class_accuracy",
        "Accuracy by class",
        figures.class_accuracy(seen, result["accuracy"]),
        f"With 95% Wilson intervals.{of_many}",
    )
    log_probabilities = scores.log_softmax(logits)
    predicted = logits.argmax(axis=1)
    confidence = np.exp(log_probabilities.max(axis=1))
    page.figure(
        "calibration",
        "Calibration",
        figures.calibration(scores.reliability(confidence, predicted == labels)),
        f"Expected calibration error {result['ece']:.2%} over {scores.NUM_BINS} bins "
        "(Guo et al. 2017); below the diagonal the model is too sure.",
    )
    wrong = np.flatnonzero(predicted != labels)
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:12]
    if len(worst):
        captions = [
            (f"{names[predicted[i]]} {confidence[i]:.0%}", f"is {names[labels[i]]}") for i in worst
        ]
        page.figure(
            "mistakes",
            "Most confident mistakes",
            figures.pictures([examples.images[i] for i in worst], captions),
            "What the model said and how sure it was; beneath, the label.",
        )


def add_attention(page, loaded, images, captions):
    """Every head of every layer over real images, the rollout, and how far heads look."""
    grid, patch = patch_grid(loaded), loaded.model.patch_size
    _, maps = make_classify(loaded, batch_size=8, attention=True)(images)
    with_token = maps.shape[-1] > grid[0] * grid[1]
    asks = "all patches attend to: their mean is classified"
    if with_token:
        asks = "the class token attends to: it is what is classified"
    page.section(
        "Attention",
        f"What {asks}. Caught in the forward pass that was trained; there is no second model.",
    )
    wide = loaded.model.num_heads > 6
    for i in range(min(2 if wide else 4, len(images))):
        drawing = figures.attention(
            attention.picture(images[i], maps[i], grid),
            loaded.model.depth,
            loaded.model.num_heads,
            attention.TILE,
            attention.GAP,
        )
        page.figure(
            f"attention_{i + 1}",
            ", ".join(captions[i]),
            drawing,
            "Bright is where it looks. Top: the image, and the rollout of all layers "
            "(Abnar and Zuidema 2020).",
            wide=wide,
        )
    flows = attention.looked_at(np.stack([attention.rollout(m) for m in maps[:8]]), grid)
    pairs = zip(images, flows, strict=False)
    page.figure(
        "rollout",
        "Attention rollout",
        figures.pictures(
            [t for x, w in pairs for t in (attention.plain(x, 64), attention.overlay(x, w, 64))],
            [words for caption in captions[:8] for words in (caption, ("", ""))],
        ),
        "Each image, and how much of its parts reaches the classified end of all layers.",
    )
    per_image = attention.distance(maps, grid, patch).mean(axis=0)
    second = None
    if with_token:
        of_token = attention.spread(attention.looked_at(maps, grid), patch).mean(axis=0)
        second = ("from a patch", "class token, from its centre", of_token)
    caption = f"Pixels between a patch and what it attends to, mean over {len(images)} images."
    if with_token:
        caption += " The class token has no place: how far its attention spreads from its centre."
    page.figure(
        "attention_distance",
        "How far attention reaches",
        figures.by_layer(per_image, ylabel="pixels", second=second),
        caption,
    )


def first_filters(kernel, stem):
    """(float[n, P, P] or [n, P, P, 3] in 0..1, title, caption) of float[P, P, C, D] weights."""
    P, _, C, D = kernel.shape
    if stem == "conv":
        filters, title = kernel.transpose(3, 0, 1, 2)[:64], "Filters of the first convolution"
        caption = f"{len(filters)} of {D} filters of {P}x{P} pixels, each scaled to its own range."
    else:  # as figure 7 of arXiv 2010.11929
        components = np.linalg.svd(kernel.reshape(-1, D), full_matrices=False)[0].T[:32]
        filters, title = components.reshape(-1, P, P, C), "Patch filters"
        caption = f"The first {len(filters)} principal components of the {D} patch filters."
    filters = filters if C == 3 else filters.mean(axis=-1)
    most = np.abs(filters).max(axis=tuple(range(1, filters.ndim)), keepdims=True)
    return 0.5 + 0.5 * filters / np.maximum(most, 1e-12), title, caption


def add_weights(page, loaded):
    """Patch filters, positions, and the norms of weights by layer."""
    model, params, _ = loaded
    page.section("Weights")
    stem = params["conv_stem"]["conv_0"] if model.stem == "conv" else params["patch_embed"]
    filters, title, caption = first_filters(np.asarray(stem["kernel"]), model.stem)
    page.figure("filters", title, figures.tiles(filters, columns=8), caption)
    grid = patch_grid(loaded)
    if model.posemb == "learned":
        positions = np.asarray(params["pos_embed"])[0]
    else:
        positions = sincos2d(grid, model.width, cls_token=False)[0]
    positions = positions[-grid[0] * grid[1] :]
    positions = positions / np.maximum(np.linalg.norm(positions, axis=1, keepdims=True), 1e-12)
    similarity = (positions @ positions.T).reshape(-1, *grid)
    page.figure(
        "positions",
        "Position embeddings",
        figures.tiles(similarity, grid[1], span=(-1, 1), colourbar="cosine similarity"),
        "Each little picture is one patch: how alike its position embedding is to every other's.",
    )
    page.figure(
        "weight_norms",
        "Weight norms by layer",
        figures.bars(*norms(params), xlabel="L2 norm"),
        "Of all parameters of a layer together.",
    )


def add_gradients(page, loaded, images, labels):
    """The norms of the gradient by layer, beside those of the weights."""
    model, params, config = loaded

    def loss_fn(params):
        x = augment.normalize(images, config.data.mean, config.data.std)
        logits = model.apply({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    gradient = jax.jit(jax.grad(loss_fn))(jax.tree.map(jnp.asarray, params))
    page.figure(
        "gradient_norms",
        "Gradient norms by layer",
        figures.bars(*norms(gradient), xlabel="L2 norm"),
        f"Of the loss on {len(images)} images as evaluation sees them, at these weights.",
    )


def norms(tree):
    """(names, L2 norms) of a model's parts, from the image to the head."""
    order = ("conv_stem", "patch_embed", "cls_token", "pos_embed")
    blocks = sum(name.startswith("block_") for name in tree)
    order += (*(f"block_{i}" for i in range(blocks)), "norm", "pre_logits", "head")
    names = [name for name in order if name in tree]
    return names, [float(optax.tree.norm(tree[name])) for name in names]


def outcome(records, name):
    """float64[seeds]: a field of result.json, of the seeds that have it."""
    return np.array([r.result[name] for r in records if r.result and name in r.result])


def mean_and_spread(values):
    """'0.5708', or '0.5708 ± 0.0031' with the standard deviation of several."""
    spread = f" ± {values.std(ddof=1):.4f}" if len(values) > 1 else ""
    return f"{values.mean():.4f}{spread}" if len(values) else "–"


def percent(values):
    """'80.09%', or '80.09 ± 0.21%'."""
    spread = f" ± {100 * values.std(ddof=1):.2f}" if len(values) > 1 else ""
    return f"{100 * values.mean():.2f}{spread}%" if len(values) else "–"


def add_comparison(page, groups):
    """A table of results with mean and spread over seeds, and where the configs differ."""
    page.section(
        "Comparison", "Mean and standard deviation over seeds, of the final step's weights."
    )
    rows = []
    for name, records in groups:
        row = [name, f"{sum(r.result is not None for r in records)} of {len(records)}"]
        row += [
            percent(outcome(records, "test_accuracy")),
            mean_and_spread(outcome(records, "test_loss")),
            percent(outcome(records, "val_accuracy")),
            mean_and_spread(outcome(records, "train_loss")),
        ]
        result = next((r.result for r in records if r.result), None)
        rate = result and result["images_per_second"]
        row += [f"{result['num_params']:,}" if result else "–", f"{rate:,.0f}" if rate else "–"]
        rows.append(row)
    head = ("run", "seeds ended", "test accuracy", "test loss", "val accuracy", "train loss")
    page.table("Results", (*head, "parameters", "images/s"), rows)
    configs = [records[0].config for _, records in groups]
    names = config_lib.FIELDS
    differing = []
    for name in names:
        values = [config_lib.get_field(c, name) for c in configs]
        if name not in ALIKE and any(v != values[0] for v in values):
            differing.append([name, *map(repr, values)])
    if differing:
        page.table("Where the configs differ", ("field", *(n for n, _ in groups)), differing)


def add_identity(page, records):
    """Command, commit, versions, devices and time; the config, and where it is not its recipe's."""
    page.section("This run")
    record, run = records[0], records[0].run
    path, recipe = recipe_of(run["command"])
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    seconds = outcome(records, "seconds")
    processes = "process" if run["processes"] == 1 else "processes"
    rows = [
        ("command", run["command"] or "from Python"),
        ("commit", run["commit"] or "not known"),
        ("started", run["date"]),
        ("training", metrics.duration(seconds[0]) if len(seconds) else "not complete"),
        ("devices", f"{len(run['devices'])} x {run['devices'][0]}, {run['processes']} {processes}"),
        ("host", run["host"]),
        ("versions", versions),
    ]
    page.table("Where it comes from", (), rows)
    title = f"What differs from {path}"
    if recipe is None:
        recipe = config_lib.defaults()
        title = f"What differs from the defaults ({path} is not in configs/)"
    here, there = (config_lib.flat(c) for c in (record.config, recipe))
    of_seeds = ("seed", "num_seeds") if len(records) > 1 else ()
    rows = [
        (n, repr(v), repr(there[n])) for n, v in here.items() if v != there[n] and n not in of_seeds
    ]
    if rows:
        page.table(title, ("field", "here", "there"), rows)
    else:
        page.parts.append(f"<p class=note>The config is {escape(str(path))} as it stands.</p>")
    page.parts.append("<details class=wide><summary>Every field of the config</summary>")
    page.table("", (), [(n, repr(v)) for n, v in here.items()])
    page.parts.append("</details>")


def headline(records, result, split):
    """[(number, what it is)] that the page opens with."""
    cards = []
    accuracy = outcome(records, "test_accuracy")
    if len(accuracy) > 1:
        cards.append((percent(accuracy), f"test, {len(accuracy)} seeds"))
    elif result:
        low, high = result["accuracy_interval"]
        cards.append((f"{result['accuracy']:.2%}", f"on {split} ({low:.1%} to {high:.1%})"))
    elif len(accuracy):
        cards.append((percent(accuracy), "test accuracy"))
    if result:
        cards += [(f"{result['loss']:.3f}", "loss"), (f"{result['ece']:.1%}", "calibration error")]
    done = next((r.result for r in records if r.result), None)
    if done:
        cards += [(f"{done['num_params'] / 1e6:.2f} M", "parameters")]
        cards += [(metrics.duration(done["seconds"]), f"training, {done['device']}")]
    else:
        cards.append((f"{records[0].last_step:,}", "last step"))
    return cards


def finite(params):
    """Whether all weights are finite numbers."""
    return all(np.isfinite(x).all() for x in jax.tree.leaves(params))


def report(workdir, *, compare=(), step="last", split=None, name=None):
    """Writes the page of a run and returns its path.

    Args:
      workdir: the run's directory.
      compare: other runs' directories, beside it in the curves and in tables.
      step: the checkpoint that is looked into: a saved step, "best" or "last".
      split, name: the data it is evaluated on; see `evaluate.load_examples`.
    Raises UserError where there is no run, or matplotlib is missing.
    """
    if figures is None:
        raise UserError("the report needs matplotlib: pip install 'vit-jax[report]'")
    workdir, *compare = map(expand_home, (workdir, *compare))
    runs = [(printable(w.resolve().name), read_records(w)) for w in (workdir, *compare)]
    records = runs[0][1]
    said, result, shown_split = states(records), None, ""
    for other, others in runs[1:]:
        said += states(others, run=other)
    folder = workdir / "report"
    make_folder(folder)
    for path in (folder, *folder.iterdir()):
        if path.is_symlink():  # whoever made the workdir chose where it leads
            raise UserError(f"{path} is a symbolic link, and a report writes there: remove it")
    page = Page(folder)
    with figures.style():
        if compare:
            add_comparison(page, grouped(runs))
        add_curves(page, grouped(runs) if compare else runs)
        try:
            loaded = load(records[0].workdir, step)
            if not finite(loaded.params):
                raise UserError(f"the weights of step {loaded.step:,} are not finite numbers")
        except UserError as e:
            said.append(f"Nothing to look into: {e}.")
        else:
            try:
                examples, labels, shown_split = evaluate.load_examples(loaded, name, split)
            except UserError as e:
                said.append(f"Not evaluated, the data cannot be read: {e}.")
                add_weights(page, loaded)
            else:
                classify = make_classify(loaded, batch_size=loaded.config.eval_batch_size)
                logits = classify(examples.images)
                names = [printable(name) for name in loaded.class_names]
                result = scores.score(logits, labels, names)
                add_evaluation(page, loaded, examples, labels, logits, result, shown_split)
                # The first image of each class, then others, in the split's order.
                first = np.sort(np.unique(labels, return_index=True)[1])
                order = np.r_[first, np.setdiff1d(np.arange(min(32, len(labels))), first)][:64]
                captions = [
                    (names[labels[i]], f"seen as {names[logits[i].argmax()]}") for i in order
                ]
                add_attention(page, loaded, examples.images[order], captions)
                add_weights(page, loaded)
                some = slice(NUM_GRADIENT_IMAGES)
                add_gradients(page, loaded, examples.images[some], labels[some])
        add_identity(page, records)
    page.end()
    path = folder / "index.html"
    cards = headline(records, result, shown_split)
    content = render(runs[0][0], records, cards, said, page)
    # Plain ASCII is right in every locale.
    metrics.write_json(path, content.encode("ascii", "xmlcharrefreplace").decode())
    return path


def render(name, records, cards, said, page):
    """The whole page as text."""
    cards = "".join(f"<div><b>{escape(b)}</b><span>{escape(s)}</span></div>" for b, s in cards)
    c = records[0].config
    length = f"{c.steps:,} steps" if c.steps else f"{c.epochs:g} epochs"
    return string.Template(TEMPLATE.read_text()).substitute(
        name=escape(name),
        about=escape(f"{c.data.name} · {length} of batch {c.batch_size}"),
        said="".join(f"<p class=said>{escape(sentence)}</p>" for sentence in said),
        cards=cards,
        links="".join(f'<a href="#{i}">{title}</a>' for i, title in page.sections),
        sections="".join(page.parts),
    )


def _main():
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m vit_jax.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", required=True, help="the run's directory")
    parser.add_argument(
        "--compare", nargs="+", default=(), metavar="D", help="other runs' directories"
    )
    parser.add_argument("--step", default="last", help="a saved step, best or last (default)")
    parser.add_argument(
        "--data", help="a folder of class folders or a TFDS name; default: the run's"
    )
    parser.add_argument("--split", help="a TFDS split; default: the run's test_split")
    args = parser.parse_args()
    mesh.keep_compiled()
    path = report(
        args.workdir, compare=args.compare, step=args.step, split=args.split, name=args.data
    )
    print(path)


if __name__ == "__main__":
    run_command(_main)
