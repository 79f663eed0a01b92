"""The report's plots: arrays in, a matplotlib Figure out."""

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

_COLORS = ("#1f5fbf", "#c4501b", "#1a7f5a", "#8a3fb5", "#a8324a", "#7d6608")
_STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "grid.color": "#d5dae0",
    "legend.frameon": False,
    "svg.fonttype": "none",  # keep text editable
    "text.parse_math": False,  # a class name may contain $
}
_LINES = {
    "thin": {"linewidth": 0.8, "alpha": 0.45},
    "line": {},
    "dots": {"marker": "o", "markersize": 3.5},  # visible even for a single point
    "dashed": {"linestyle": (0, (4, 2)), "marker": "o", "markersize": 3},
    "star": {"linestyle": "none", "marker": "*", "markersize": 11},
}
_WIDTH = 4.6  # inches: one column of the page


def style():
    """Returns the context manager in which all figures must be made and converted."""
    return matplotlib.rc_context(_STYLE)


def thin(values, most=800):
    """Averages runs of consecutive values so that at most `most` remain."""
    length = -(-len(values) // most)
    runs = np.array_split(np.asarray(values, float), range(length, len(values), length))
    return np.array([run.mean() for run in runs])


def curves(series, *, ylabel):
    """Draws metrics against training steps, with accuracies in percent.

    `series` is a list of (label or None, color index, key of _LINES, steps, values).
    """
    figure = Figure(figsize=(_WIDTH, 3.0))
    axes = figure.add_subplot()
    for label, color, line, steps, values in series:
        color = _COLORS[color % len(_COLORS)]
        axes.plot(thin(steps), thin(values), color=color, label=label, **_LINES[line])
    axes.set_xlabel("step")
    axes.set_ylabel(ylabel)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    if ylabel == "accuracy":
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    if any(label for label, *_ in series):
        axes.legend()
    return figure


def severities(errors):
    """Draws {kind: errors at severities 1, 2, ...} as lines that start at the clean error."""
    figure = Figure(figsize=(_WIDTH, 3.0))
    axes = figure.add_subplot()
    kinds = [kind for kind in errors if kind != "clean"]
    for i, kind in enumerate(kinds):
        values = [*errors.get("clean", [])[:1], *errors[kind]]
        first = len(errors[kind]) + 1 - len(values)
        line = {"color": _COLORS[i % len(_COLORS)], "linestyle": "-" if i < len(_COLORS) else "--"}
        axes.plot(range(first, first + len(values)), values, label=kind, marker="o", ms=3, **line)
    axes.set_xlabel("severity")
    axes.set_ylabel("error")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8)
    return figure


def confusion(matrix, names, totals):
    """Draws an int[true, predicted] confusion matrix, colored by share of the true class.

    `totals`, int[true], also counts the images that are predicted as a class not in `matrix`.
    """
    n = len(names)
    side = max(_WIDTH, 1.4 + 0.32 * n)
    figure = Figure(figsize=(side, side * 0.94))
    axes = figure.add_subplot()
    shares = matrix / np.maximum(totals, 1)[:, None]
    axes.imshow(shares**0.6, cmap="Blues", vmin=0, vmax=1, interpolation="none")
    for i, j in np.argwhere(matrix):
        text = f"{matrix[i, j]:,}" if matrix.max() < 10_000 else f"{shares[i, j]:.0%}"
        color = "white" if shares[i, j] > 0.42 else "black"
        axes.text(j, i, text, ha="center", va="center", fontsize=8, color=color)
    axes.set_xticks(range(n), names, rotation=45, ha="right")
    axes.set_yticks(range(n), names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    return figure
