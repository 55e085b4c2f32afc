"""Learning curves, and leakage against utility."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from anonfw.compare.experiment import Experiment
from anonfw.compare.table import REFERENCES, known

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours without the yellow, which is too pale on white; told apart by the colour-blind as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#AA4499", "#3D3D3D", "#56B4E9", "#E69F00", "#882255")
DASHES = ("-", "--", ":")  # the ninth run has the first one's colour and another line
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h", "p", "d")
PANELS = 9
POINTS = 400  # of one curve; more are averaged in groups
STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "axes.axisbelow": True,
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "legend.frameon": False,
    "svg.hashsalt": "anonfw",
}
# What is kept: measure, axis. For all of them less is better, so the best corner is at the lower left.
UTILITY = {
    "pose_error": "head pose error (degrees)",
    "expression_error": "expression error (sd of the originals)",
    "outside_distance": "change outside the face (0..255)",
}


def colour(number: int) -> str:
    """Of the run with that number, everywhere."""
    return COLOURS[number % len(COLOURS)]


def learning_curves(experiments: Sequence[Experiment], labels: Sequence[str]) -> Figure | None:
    """A panel a loss: what is validated first, then what is trained. None where nothing was logged."""
    names = _losses(experiments)
    if not names:
        return None
    figure, panels = _panels(len(names), labels, [any(name in e.curves for name in names) for e in experiments])
    for name, axes in zip(names, panels, strict=True):
        for number, experiment in enumerate(experiments):
            steps, values = experiment.curves.get(name, (np.empty(0), np.empty(0)))
            if len(steps):
                _curve(axes, number, steps + 1, values)
        lengths = [line.get_xdata()[-1] for line in axes.lines]
        if max(lengths) > 10 * min(lengths):
            axes.set_xscale("log")
        axes.set_title(name, loc="left")
        axes.set_xlabel("optimizer steps")
        low, high = axes.get_ylim()
        spread = [y for line in axes.lines for y in line.get_ydata() if y > 0]
        if low > 0 and high / min(spread) > 50:
            axes.set_yscale("log")
    return figure


def leakage_utility(experiments: Sequence[Experiment], labels: Sequence[str]) -> Figure | None:
    """How often a recogniser finds the very photo, against what is lost of it, with intervals. None without both."""
    leak = _leakage(experiments)
    kept = [name for name in UTILITY if leak and any(_both(e.result(), leak, name) for e in experiments)]
    if not kept:
        return None
    shown = [any(_both(e.result(), leak, name) for name in kept) for e in experiments]
    figure, panels = _panels(len(kept), labels, shown)
    for name, axes in zip(kept, panels, strict=True):
        for number, experiment in enumerate(experiments):
            if _both(row := experiment.result(), leak, name):
                x, y = row[leak], row[name]
                axes.errorbar(
                    100 * x.value,
                    y.value,
                    xerr=_ends(x, 100),
                    yerr=_ends(y, 1),
                    color=colour(number),
                    marker=MARKERS[number % len(MARKERS)],
                    markersize=6,
                    capsize=2.5,
                    elinewidth=1.1,
                    zorder=3,
                )
        for reference in REFERENCES:
            _mark(axes, reference, experiments, leak, name)
        axes.set_xlabel(f"found in the very photo (TPR % at FPR {leak.partition('@')[2]})")
        axes.set_ylabel(UTILITY[name])
        axes.margins(0.1)
        axes.autoscale_view()
        axes.set_xlim(left=-0.02 * axes.get_xlim()[1])  # what leaks nothing is drawn whole
        axes.set_ylim(bottom=0)
    return figure


def png(figure: Figure) -> bytes:
    """For a document: 150 dots an inch."""
    return _written(figure, "png", dpi=150)


def svg(figure: Figure) -> str:
    """For the page: the element alone, text as paths, equal bytes for equal figures."""
    text = _written(figure, "svg", metadata={"Date": None}).decode()
    return text[text.index("<svg") :]


def _written(figure: Figure, kind: str, **arguments: object) -> bytes:
    import matplotlib

    stream = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(stream, format=kind, bbox_inches="tight", pad_inches=0.08, facecolor="white", **arguments)
    return stream.getvalue()


def _panels(count: int, labels: Sequence[str], shown: Sequence[bool]) -> tuple[Figure, list[Axes]]:
    """Up to three in a row, and below them one legend for all: colour and mark of each run that is shown."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = min(count, 3)
    rows = math.ceil(count / columns)
    across = max(1, min(sum(shown), int(3.9 * columns * 12 // (max(map(len, labels)) + 6))))
    legend = 0.22 * math.ceil(sum(shown) / across) + 0.1
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.9 * columns, 2.9 * rows + legend), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
        panels = [figure.add_subplot(rows, columns, number + 1) for number in range(count)]
        lines = [
            Line2D(
                [], [], color=colour(n), linestyle=_dash(n), marker=MARKERS[n % len(MARKERS)], markersize=5, label=text
            )
            for n, text in enumerate(labels)
            if shown[n]
        ]
        figure.legend(handles=lines, loc="outside lower left", ncols=across, handlelength=2.6, columnspacing=1.6)
    return figure, panels


def _dash(number: int) -> str:
    return DASHES[number // len(COLOURS) % len(DASHES)]


def _losses(experiments: Sequence[Experiment]) -> list[str]:
    logged = list(dict.fromkeys(name for e in experiments for name in e.curves))
    found = [name for head in ("val/", "train/") for name in sorted(logged) if name.startswith(head)]
    terms = {term for e in experiments for term in (e.recipe.get("system") or {}).get("losses") or {}}
    # The total first, then its terms, then what is watched besides.
    found.sort(key=lambda name: (not name.endswith("/loss"), name.partition("/")[2] not in terms))
    return found[:PANELS]


def _curve(axes: Axes, number: int, steps: np.ndarray, values: np.ndarray) -> None:
    """Few points are marked. Many are shown faintly, with their running mean over a twentieth of them on top."""
    few = len(steps) <= 12
    style = {"color": colour(number), "linestyle": _dash(number)}
    if few:
        axes.plot(steps, values, marker=MARKERS[number % len(MARKERS)], markersize=3.5, linewidth=1.3, **style)
        return
    if len(steps) > POINTS:
        groups = np.array_split(np.arange(len(steps)), POINTS)
        steps = np.array([steps[group].mean() for group in groups])
        values = np.array([values[group].mean() for group in groups])
    reach = len(steps) // 40  # to each side; less at both ends, so that the mean does not lag behind a steep fall
    near = [min(reach, at // 4, len(steps) - 1 - at) for at in range(len(steps))]
    if reach:
        axes.plot(steps, values, linewidth=0.8, alpha=0.25, **style)
        values = np.array([values[at - n : at + n + 1].mean() for at, n in enumerate(near)])
    axes.plot(steps, values, linewidth=1.4, **style)


def _leakage(experiments: Sequence[Experiment]) -> str | None:
    """The verification measure at the largest false positive rate, which a small set resolves best."""
    measures = {name for e in experiments for name in e.result() if name.startswith("tpr_source@")}
    return max(measures, key=lambda name: float(name.partition("@")[2]), default=None)


def _both(row: dict, leak: str, name: str) -> bool:
    return leak in row and name in row and known(row[leak].value) and known(row[name].value)


def _ends(estimate: object, scale: float) -> list[list[float]] | None:
    if not (known(estimate.low) and known(estimate.high)):
        return None
    return [[scale * (estimate.value - estimate.low)], [scale * (estimate.high - estimate.value)]]


def _mark(axes: Axes, reference: str, experiments: Sequence[Experiment], leak: str, name: str) -> None:
    """Where a reference row lies; a line across where it has no such utility (a black box has no pose)."""
    row = next((e.row(reference) for e in experiments if leak in e.row(reference)), None)
    if row is None:
        return
    x, y = 100 * row[leak].value, row[name].value if name in row else math.nan
    grey, text = "#777777", reference.replace("_", " ")
    if known(y):
        axes.plot(x, y, marker="*", markersize=10, color=grey, linestyle="none", zorder=2)
        axes.annotate(text, (x, y), (7, 4), textcoords="offset points", color=grey, fontsize=8)
    else:
        axes.axvline(x, color=grey, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "rotation": 90}
        axes.annotate(text, (x, 0.6), (3, 0), va="center", ha="left", color=grey, fontsize=8, **place)
