"""The report's matplotlib figures: arrays in, a Figure out.

Each figure is drawn once in COLORS and used three times: as PNG and SVG files for papers, and in
the page, where `_inline` replaces the colors by CSS variables for light and dark mode.
"""

import io
import re

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter

from vit_jax.inference.scores import wilson

# CSS variable: its color in files. The colors must all differ.
COLORS = {
    "ink": "#1b1f24",
    "muted": "#59636e",
    "line": "#d5dae0",
    "paper": "#fefefe",
    "c0": "#1f5fbf",
    "c1": "#c4501b",
    "c2": "#1a7f5a",
    "c3": "#8a3fb5",
    "c4": "#a8324a",
    "c5": "#7d6608",
}
INK, MUTED, LINE, PAPER = (COLORS[name] for name in ("ink", "muted", "line", "paper"))
SERIES = [COLORS[f"c{i}"] for i in range(6)]
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9.5,
    "axes.prop_cycle": matplotlib.cycler(color=SERIES),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlesize": 9.5,
    "figure.constrained_layout.use": True,
    "figure.facecolor": PAPER,
    "font.family": "sans-serif",
    "font.size": 9.5,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.8,
    "savefig.dpi": 200,
    "svg.fonttype": "none",  # keep text searchable and editable
    "text.color": INK,
    "text.parse_math": False,  # a class name may contain $
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}
WIDTH, HEIGHT = 4.6, 3.0  # inches: one column of the page


def style():
    """Returns the context manager in which all figures must be made and saved."""
    return matplotlib.rc_context(STYLE)


def save(figure, folder, name):
    """Writes folder/NAME.png and NAME.svg. Returns the SVG element for the page."""
    figure.savefig(folder / f"{name}.png")
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):  # ids unique within the page
        figure.savefig(file, format="svg", metadata={"Date": None})
    (folder / f"{name}.svg").write_text(file.getvalue(), encoding="utf-8")
    return _inline(file.getvalue(), name)


def _inline(svg, label):
    """Converts an SVG file to a page element with CSS variables as colors and no fixed size."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)  # matplotlib repeats these in every figure
    svg = re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{label}">', svg
    )
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)  # the page's font
    for name, color in COLORS.items():
        svg = re.sub(f"(fill|stroke): {color}", rf"\1: var(--{name})", svg)
    return svg


def _axes(width=WIDTH, height=HEIGHT):
    figure = Figure(figsize=(width, height))
    return figure, figure.add_subplot()


def thin(x, y, most=800):
    """Averages runs of consecutive points so that at most `most` remain."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    stretch = -(-len(x) // most)
    if stretch < 2:
        return x, y
    starts = np.arange(0, len(x), stretch)
    count = np.diff(np.append(starts, len(x)))
    return np.add.reduceat(x, starts) / count, np.add.reduceat(y, starts) / count


def curves(series, *, ylabel, percent=False, log=False):
    """Draws lines over training steps.

    Args:
      series: a list of (label or None, color index, style, steps, values); the style is "thin",
        "line", "dots" (visible even for a single point), "dashed", or "star".
      ylabel: the label of the y axis.
      percent: whether values are shown as percentages.
      log: whether the y axis is logarithmic if values span more than a factor of 100.
    """
    figure, axes = _axes()
    for label, color, style, x, y in series:
        x, y = thin(x, y)
        looks = {
            "thin": {"linewidth": 0.8, "alpha": 0.45},
            "line": {},
            "dots": {"marker": "o", "markersize": 3.5},
            "dashed": {"linestyle": (0, (4, 2)), "marker": "o", "markersize": 3},
            "star": {"linestyle": "none", "marker": "*", "markersize": 11},
        }[style]
        axes.plot(x, y, color=SERIES[color % len(SERIES)], label=label, **looks)
    axes.set_xlabel("step")
    axes.set_ylabel(ylabel)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    values = np.concatenate([y for *_, y in series])
    values = values[np.isfinite(values)]
    if log and len(values) and 0 < values.min() < values.max() / 100:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    if any(label for label, *_ in series):
        axes.legend()
    return figure


def confusion(matrix, names):
    """Draws an int[true, predicted] confusion matrix, colored by share of the true class."""
    n = len(names)
    side = max(WIDTH, 1.4 + 0.32 * n)
    figure, axes = _axes(side, side * 0.94)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    for (i, j), share in np.ndenumerate(shares):
        if not matrix[i, j]:
            continue
        square = matplotlib.patches.Rectangle(
            (j - 0.5, i - 0.5), 1, 1, color=SERIES[0], alpha=share**0.6, linewidth=0
        )
        axes.add_patch(square)
        color = PAPER if share > 0.42 else INK
        text = f"{matrix[i, j]:,}" if matrix.max() < 10_000 else f"{share:.0%}"
        axes.text(j, i, text, ha="center", va="center", fontsize=8, color=color)
    axes.set_xlim(-0.5, n - 0.5)
    axes.set_ylim(n - 0.5, -0.5)
    axes.set_xticks(range(n), names, rotation=45 if n > 4 else 0, ha="right" if n > 4 else "center")
    axes.set_yticks(range(n), names)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    return figure


def class_accuracy(classes, overall):
    """Draws the accuracy and 95% interval of each class from `scores.score`, best on top."""
    classes = sorted(classes, key=lambda c: c["accuracy"])
    figure, axes = _axes(WIDTH, max(HEIGHT, 0.9 + 0.27 * len(classes)))
    accuracy = np.array([c["accuracy"] for c in classes])
    low, high = np.array([c["interval"] for c in classes]).T
    y = np.arange(len(classes))
    axes.axvline(overall, color=MUTED, linewidth=1, linestyle=(0, (3, 3)))
    error = np.maximum([accuracy - low, high - accuracy], 0)
    axes.errorbar(accuracy, y, xerr=error, fmt="o", markersize=5, color=SERIES[0], elinewidth=1.6)
    for value, i in zip(accuracy, y, strict=True):
        axes.annotate(
            f"{value:.1%}", (1.02, i), xycoords=("axes fraction", "data"), va="center", fontsize=8.5
        )
    axes.set_yticks(y, [c["class"] for c in classes])
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("accuracy (dashed: all images)")
    return figure


def calibration(bins):
    """Draws accuracy and image counts against confidence for bins from `scores.reliability`."""
    figure = Figure(figsize=(WIDTH, WIDTH * 0.94))
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    count, confidence, accuracy = bins[bins[:, 0] > 0].T
    low, high = np.array([wilson(a * n, n) for a, n in zip(accuracy, count, strict=True)]).T
    error = np.maximum([accuracy - low, high - accuracy], 0)
    above.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (3, 3)))
    above.errorbar(confidence, accuracy, yerr=error, fmt="o", markersize=5, elinewidth=1.6)
    above.set_ylabel("accuracy")
    above.set_ylim(0, 1)
    edges = (np.arange(len(bins)) + 0.5) / len(bins)
    below.bar(edges, bins[:, 0] / bins[:, 0].sum(), 0.9 / len(bins), color=SERIES[1], alpha=0.8)
    below.set_ylabel("images")
    below.set_xlabel("confidence (dashed: calibrated)")
    below.set_xlim(0, 1)
    for axis in (above.yaxis, below.yaxis, below.xaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    below.yaxis.set_major_locator(MaxNLocator(2))
    return figure


def pictures(images, captions, columns=4):
    """Draws uint8[H, W, C] images in a grid, each above a two-line caption."""
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(WIDTH, rows * (WIDTH / columns + 0.4)))
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, image, lines in zip(grid, images, captions, strict=False):
        axes.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="none")
        for text, color, below in zip(lines, (SERIES[1], MUTED), (-3, -14), strict=True):
            axes.annotate(
                text,
                (0.5, 0),
                (0, below),
                xycoords="axes fraction",
                textcoords="offset points",
                ha="center",
                va="top",
                fontsize=8.5,
                color=color,
            )
    return figure


def attention(mosaic, depth, num_heads, tile, gap):
    """Draws the result of `attention.mosaic` with labels for layers and heads."""
    H, W, _ = mosaic.shape
    width = max(WIDTH, 0.6 * num_heads + 0.6)
    figure, axes = _axes(width, (width - 0.62) * H / W + 0.3)
    axes.imshow(mosaic, interpolation="none")
    height, middle = (H + gap) / (depth + 1), tile / 2
    layers = [f"layer {i + 1}" for i in range(depth)]
    axes.set_yticks([(i + 1) * height + middle for i in range(depth)], layers)
    heads = [f"head {i + 1}" if num_heads < 7 else f"{i + 1}" for i in range(num_heads)]
    axes.set_xticks([i * (tile + gap) + middle for i in range(num_heads)], heads)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    return figure


def by_layer(points, *, ylabel, second=None):
    """Draws float[L, h] as one dot per head and a line through the layer means.

    `second` adds another float[L, h]: (label of the first, label of the second, values).
    """
    figure, axes = _axes()
    first_label, second_label, more = second or (None, None, None)
    for shift, color, label, values in (
        (-0.08, 0, first_label, points),
        (0.08, 1, second_label, more),
    ):
        if values is None:
            continue
        layers = np.arange(1, len(values) + 1)
        x = np.repeat(layers[:, None] + (shift if second else 0), values.shape[1], axis=1)
        axes.plot(x.ravel(), values.ravel(), "o", markersize=5, alpha=0.65, color=SERIES[color])
        axes.plot(x[:, 0], values.mean(axis=1), color=SERIES[color], linewidth=1.2, label=label)
    axes.set_xlabel("layer (one dot per head)")
    axes.set_ylabel(ylabel)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    if second:
        axes.legend()
    return figure


def tiles(images, columns, *, cmap="viridis", span=(0, 1), colorbar=None):
    """Draws float[n, h, w] or [n, h, w, 3] tiles as one mosaic with thin gaps."""
    n, h, w = images.shape[:3]
    gap = 1 if min(h, w) > 2 else 0
    rows = -(-n // columns)
    if images.ndim == 3:
        low, high = span
        images = matplotlib.colormaps[cmap]((images - low) / max(high - low, 1e-12))
    else:
        images = np.concatenate([images, np.ones((*images.shape[:3], 1))], axis=-1)
    page = np.zeros((rows * (h + gap) - gap, columns * (w + gap) - gap, 4))  # gaps are transparent
    for i, image in enumerate(images):
        top, left = i // columns * (h + gap), i % columns * (w + gap)
        page[top : top + h, left : left + w] = image
    figure, axes = _axes(WIDTH, WIDTH * page.shape[0] / page.shape[1] * (0.86 if colorbar else 1))
    axes.imshow(np.clip(page, 0, 1), interpolation="none")
    axes.set_axis_off()
    if colorbar:
        colors = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(*span), cmap)
        bar = figure.colorbar(colors, ax=axes, shrink=0.8, aspect=30)
        bar.outline.set_visible(False)
        bar.set_label(colorbar)
    return figure


def bars(names, values, *, xlabel):
    """Draws horizontal bars, the first on top."""
    figure, axes = _axes(WIDTH, max(HEIGHT, 0.9 + 0.24 * len(names)))
    y = np.arange(len(names))
    axes.barh(y, values, 0.7, color=SERIES[0], alpha=0.85)
    axes.set_yticks(y, names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(xlabel)
    return figure
