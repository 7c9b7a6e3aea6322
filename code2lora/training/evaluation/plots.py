"""Draw the figures of an evaluation and of an audit as PNG images.

Every drawing function returns the bytes of one image. Nothing is shown, no global state of
matplotlib is touched, and names that come from repositories are drawn as they are: no mathematics.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_PANELS = {
    "nll": "nats per token minus pretrained (lower is better)",
    "exact_match": "exact match",
    "edit_similarity": "edit similarity",
}
_DPI = 110
_MOST_NAMES = 40
"""Axis labels beyond this many would be drawn over one another."""


def bars(figures: Mapping[str, Mapping[str, Any]], titles: Mapping[str, str]) -> bytes:
    """Draw the rows of one stratum side by side, with their intervals.

    figures: row -> what `compare.Figures` has, as JSON values
    """
    figure = _figure(12, 1.2 + 0.32 * len(figures))
    names = list(figures)[::-1]
    for number, (column, title) in enumerate(_PANELS.items()):
        axes = figure.add_subplot(1, len(_PANELS), number + 1)
        intervals = [_shown(figures[name], column) for name in names]
        means, errors = _means_and_errors(intervals)
        places = range(len(names))
        axes.barh(places, means, xerr=errors, color="#5b8db8", ecolor="#333333", capsize=2)
        shown = [_plain(titles[name]) for name in names] if number == 0 else []
        axes.set_yticks(list(places) if number == 0 else [], shown)
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=8)
    return _png(figure)


def decay(lines: Mapping[str, Sequence[Mapping[str, Any]]], titles: Mapping[str, str]) -> bytes:
    """Draw the gain over the pretrained row against the distance in commits, a line for each row.

    lines: row -> bins as `compare.DecayBin` has them, as JSON values
    """
    figure = _figure(8, 4.2)
    axes = figure.add_subplot(1, 1, 1)
    for name, bins in lines.items():
        places = [each["first"] for each in bins]
        means, errors = _means_and_errors([each["gain"] for each in bins])
        label = _plain(titles[name])
        axes.errorbar(places, means, errors, label=label, marker="o", ms=3, capsize=2)
    axes.axhline(0, color="#888888", lw=0.8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
    _label(axes, "commits between what was told and what is asked", "gain, nats per token")
    return _png(figure)


def lambda_curve(curve: Mapping[str, Sequence[float]]) -> bytes:
    """Draw NLL under mean + lambda (own - mean), and with a wrong repository's in its place."""
    figure = _figure(6, 4)
    axes = figure.add_subplot(1, 1, 1)
    axes.plot(curve["lambdas"], curve["own"], marker="o", label="own repository's residual")
    axes.plot(curve["lambdas"], curve["wrong"], marker="s", label="a wrong repository's residual")
    _label(axes, "lambda", "nats per token")
    return _png(figure)


def geometry(found: Mapping[str, Any]) -> bytes:
    """Draw how alike the adapters are, and how much of each is its own."""
    names = [_plain(name) for name in found["names"]]
    ticks = list(range(len(names))) if len(names) <= _MOST_NAMES else []
    shown = names if ticks else []
    figure = _figure(12, 5)
    left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    image = left.imshow(found["cosine"], vmin=-1, vmax=1, cmap="RdBu_r")
    figure.colorbar(image, ax=left, shrink=0.8)
    left.set_xticks(ticks, shown, rotation=90, fontsize=6)
    left.set_yticks(ticks, shown, fontsize=6)
    left.set_title("cosine of the adapters' weight changes", fontsize=9)
    right.barh(range(len(names)), found["residual_ratio"], color="#5b8db8")
    right.set_yticks(ticks, shown, fontsize=6)
    right.invert_yaxis()
    right.set_title("share of each adapter's norm that is not the mean's", fontsize=9)
    width = found["participation_ratio"]
    right.set_xlabel(f"participation ratio of the centred adapters: {width:.1f}", fontsize=9)
    return _png(figure)


def _shown(row: Mapping[str, Any], column: str) -> Mapping[str, float]:
    """Return a row's interval in a panel; the pretrained row is what NLL is measured from."""
    if column != "nll":
        found: Mapping[str, float] = row["columns"][column]
        return found
    zero = dict.fromkeys(("mean", "low", "high"), 0.0)
    return row["minus"].get("pretrained", {}).get("nll", zero)  # type: ignore[no-any-return]


def _means_and_errors(
    intervals: Sequence[Mapping[str, float]],
) -> tuple[list[float], list[list[float]]]:
    """Return the means, and how far each interval reaches below and above its own."""
    means = [each["mean"] for each in intervals]
    # A bootstrap of few repositories need not hold the mean, and no length is negative.
    below = [max(0.0, each["mean"] - each["low"]) for each in intervals]
    above = [max(0.0, each["high"] - each["mean"]) for each in intervals]
    return means, [below, above]


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=_DPI, layout="constrained")


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=7)


def _plain(text: str) -> str:
    """Return text that matplotlib draws as it is; between two `$` it would read mathematics."""
    return text.replace("$", r"\$")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)  # type: ignore[no-untyped-call]
    return buffer.getvalue()
