"""One curve as inline SVG that takes its colours from the page: drawn by matplotlib, then made plain."""

from __future__ import annotations

import hashlib
import io
import math
import re
import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise, zip_longest
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from stillproof.findings import Curve, Series
from stillproof.runs.wording import printable

SIZE = (5.2, 3.3)
"""Inches of 72 units: on a telephone a unit is about a pixel, and its letters can be read."""

ROOM = 46
"""Letters that fit below the x axis in one line."""

# What is drawn, by the colour it is drawn in: a variable of the page, and what to use where there is none.
COLOURS = {
    "#010101": ("ink", "#1d2329"),
    "#020202": ("muted", "#57606a"),
    "#030303": ("grid", "#dfe3e8"),
    "#040404": ("paper", "#ffffff"),
    "#0a0a01": ("series-1", "#0b66a8"),
    "#0a0a02": ("series-2", "#c2500a"),
    "#0a0a03": ("series-3", "#00785a"),
    "#0a0a04": ("series-4", "#a2407c"),
    "#0a0a05": ("series-5", "#86690a"),
    "#0a0a06": ("series-6", "#4a5568"),
}
INK, MUTED, GRID, PAPER, *SERIES = COLOURS

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
DASHES: tuple[Any, ...] = ("solid", (0, (6, 2)), (0, (2, 2)), (0, (6, 2, 1, 2)))
HATCHES = ("", "///", "...", "\\\\\\", "xx", "---", "++", "oo")

STYLE: Mapping[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be read, found and copied
    "svg.hashsalt": "stillproof",
    "text.parse_math": False,  # a name with two dollar signs is a name
    "font.family": ["DejaVu Sans"],  # comes with matplotlib: the same layout on every machine
    "font.size": 10.0,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.0,
    "axes.titlecolor": INK,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": "none",
    "hatch.linewidth": 1.1,
    "legend.frameon": False,
}


def svg(curve: Curve, place: int = 0) -> str:
    """A curve as inline SVG that scales with its container and has no ids in common with other curves.

    place: which curve of its page it is, so that two equal ones differ in their ids too.
    """
    with matplotlib.rc_context(), warnings.catch_warnings():
        # Of glyphs that DejaVu lacks and the page's fonts have; of values too far apart to lay out well.
        warnings.simplefilter("ignore", UserWarning)
        matplotlib.rcdefaults()  # not the style of whoever renders it
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=SIZE, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.grid(axis="y")
        axes.set_xlabel(_wrapped(curve.x_label, 50))
        axes.set_title(_wrapped(curve.y_label, 50), loc="left")  # lying text is read without turning the head
        draw = _draw_line if curve.kind == "line" else _draw_bars
        keys = draw(axes, curve.series)
        if not any(math.isfinite(y) for series in curve.series for _, y, *_ in _points(series)):
            axes.text(0.5, 0.5, "nothing was measured", transform=axes.transAxes, ha="center", color=MUTED)
            if not curve.levels:
                axes.set(ylim=(0, 1), yticks=[])
        _draw_levels(axes, curve.levels)
        _draw_legend(figure, keys, [series.name for series in curve.series])
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    about = f"{place}:{curve.model_dump_json()}"
    return _inline(
        drawn.getvalue(),
        prefix=f"plot-{hashlib.sha256(about.encode()).hexdigest()[:10]}-",
        label=printable(f"{curve.title}: {curve.y_label} by {curve.x_label}"),
    )


def _draw_line(axes: Axes, all_series: Sequence[Series]) -> list[Any]:
    names = _names(all_series)
    keys = []
    for number, series in enumerate(all_series):
        colour = SERIES[number % len(SERIES)]
        points = [(names.index(_name(x)) if names else float(x), y, low, high) for x, y, low, high in _points(series)]
        x, y, low, high = ([point[part] for point in points] for part in range(4))
        (line,) = axes.plot(
            x,
            y,
            color=colour,
            marker=MARKERS[number % len(MARKERS)],
            markersize=5.5,
            markeredgecolor=PAPER,
            markeredgewidth=0.8,
            linewidth=1.8,
            linestyle=DASHES[number // len(SERIES) % len(DASHES)],
            zorder=3,
        )
        keys.append(line)
        axes.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0, zorder=2)
        bounded = [math.isfinite(b) and math.isfinite(t) for b, t in zip(low, high, strict=True)]
        # A band has no width around a point without neighbours.
        alone = [
            place
            for place, here in enumerate(bounded)
            if here and not any(bounded[max(0, place - 1) : place]) and not any(bounded[place + 1 : place + 2])
        ]
        _whiskers(axes, [(x[p], low[p], high[p]) for p in alone], colour)
    if names:
        _name_positions(axes, names)
    else:
        _mark_given(axes, _numbers(all_series))
    axes.margins(x=0.04, y=0.08)
    return keys


def _draw_bars(axes: Axes, all_series: Sequence[Series]) -> list[Any]:
    names = _names(all_series) or [_name(x) for x in _numbers(all_series)]
    width = 0.78 / max(1, len(all_series))
    keys: list[Any] = []
    for number, series in enumerate(all_series):
        shift = (number - (len(all_series) - 1) / 2) * width
        points = [(names.index(_name(x)) + shift, y, low, high) for x, y, low, high in _points(series)]
        look: dict[str, Any] = {
            "facecolor": SERIES[number % len(SERIES)],
            "hatch": HATCHES[number % len(HATCHES)],
            "edgecolor": PAPER,
            "linewidth": 0.8,
        }
        there = [point for point in points if math.isfinite(point[1])]
        axes.bar([p[0] for p in there], [p[1] for p in there], width, zorder=2, **look)
        _whiskers(axes, [(p[0], p[2], p[3]) for p in there], INK)
        for x, y, _low, _high in points:
            if not math.isfinite(y):  # no bar is not a bar of height 0
                axes.text(x, 0, "–", ha="center", va="bottom", color=INK, fontsize=13)
        keys.append(Patch(**look))
    axes.axhline(0, color=MUTED, linewidth=0.8, zorder=2)
    _name_positions(axes, names)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.margins(y=0.08)
    return keys


def _draw_levels(axes: Axes, levels: Mapping[str, float]) -> None:
    known = sorted((level, name) for name, level in levels.items() if math.isfinite(_drawable(level)))
    for level, _ in known:
        axes.axhline(level, color=MUTED, linewidth=1.1, linestyle=(0, (5, 3)), zorder=2.5)
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top)
    texts = [_wrapped(name, 15) for _, name in known]
    halves = [0.032 * (text.count("\n") + 1) for text in texts]
    middles = [(level - bottom) / (top - bottom) for level, _ in known]
    # Names of levels that lie close together stand above one another, and stay beside the axes.
    for place in range(1, len(known)):
        middles[place] = max(middles[place], middles[place - 1] + halves[place - 1] + halves[place])
    ceiling = 1.0
    for place in reversed(range(len(known))):
        middles[place] = min(middles[place], ceiling - halves[place])
        ceiling = middles[place] - halves[place]
    look: dict[str, Any] = {"ha": "left", "va": "center", "color": MUTED, "fontsize": 9}
    for text, middle in zip(texts, middles, strict=True):
        axes.text(1.015, middle, text, transform=axes.transAxes, **look)


def _draw_legend(figure: Figure, keys: Sequence[Any], given: Sequence[str]) -> None:
    if not any(name.strip() for name in given):
        return
    names = [_wrapped(name, 26) for name in given]
    longest = max(len(line) for name in names for line in name.split("\n"))
    columns = max(1, min(len(names), 64 // (longest + 7)))
    legend = figure.legend(
        keys,
        [f"series {number}" for number in range(len(keys))],  # a name with a leading underscore is left out
        loc="outside upper left",
        ncols=columns,
        borderpad=0.1,
        borderaxespad=0.2,
        handlelength=2.2,
        columnspacing=1.6,
        fontsize=9.5,
    )
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(name)
    rows = math.ceil(len(names) / columns)
    lines = max(name.count("\n") + 1 for name in names)
    _grow(figure, rows * (12 * lines + 5) - 17)


def _grow(figure: Any, units: float) -> None:
    """Make the drawing higher, so that what stands around the axes does not squeeze them."""
    figure.set_figheight(figure.get_figheight() + units / 72)


def _whiskers(axes: Axes, intervals: Iterable[tuple[float, float, float]], colour: str) -> None:
    known = [(x, low, high) for x, low, high in intervals if math.isfinite(low) and math.isfinite(high)]
    if known:
        x, low, high = zip(*known, strict=True)
        axes.vlines(x, low, high, color=colour, linewidth=1.3, zorder=3)
        for ends in (low, high):
            axes.plot(x, ends, color=colour, marker="_", markersize=6, markeredgewidth=1.3, linestyle="", zorder=3)


def _mark_given(axes: Axes, given: Sequence[float]) -> None:
    """Mark the x that were measured, where there is room for their numbers."""
    labels = [_name(x) for x in given]
    if not 1 <= len(given) <= 9:
        return
    room = 270 / ((given[-1] - given[0]) or 1.0)  # units of the drawing
    needed = [3.2 * (len(left) + len(right)) + 5 for left, right in pairwise(labels)]
    if all((b - a) * room >= need for (a, b), need in zip(pairwise(given), needed, strict=True)):
        axes.set_xticks(given, labels)


def _name_positions(axes: Axes, names: Sequence[str]) -> None:
    longest = max((len(name) for name in names), default=0)
    if longest * len(names) <= ROOM:
        axes.set_xticks(range(len(names)), [_wrapped(name, ROOM) for name in names])
    elif len(names) <= 5 and all(_fits(name, ROOM // len(names)) for name in names):
        axes.set_xticks(range(len(names)), [_wrapped(name, ROOM // len(names)) for name in names])
    else:
        angle, size = (35, 9.0) if len(names) <= 12 else (90, 8.0)
        _grow(axes.figure, 3.2 * min(longest, 20))
        axes.set_xticks(range(len(names)), [_wrapped(name, 20) for name in names])
        turned = {"rotation": angle, "rotation_mode": "anchor", "ha": "right", "fontsize": size}
        for label in axes.get_xticklabels():
            label.set(va="center" if angle == 90 else "top", **turned)


def _fits(name: str, width: int) -> bool:
    return len(name) <= 2 * width and all(len(word) <= width for word in name.split())


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(printable(text), width, max_lines=3, placeholder=" …"))


def _names(all_series: Sequence[Series]) -> list[str]:
    """Names on the x axis, in the order in which they come; none where it holds numbers alone."""
    if not any(isinstance(x, str) for series in all_series for x in series.x):
        return []
    return list(dict.fromkeys(_name(x) for series in all_series for x, *_ in _points(series)))


def _numbers(all_series: Sequence[Series]) -> list[float]:
    return sorted({float(x) for series in all_series for x, *_ in _points(series)})


def _name(x: str | float) -> str:
    return x if isinstance(x, str) else f"{x:.12g}"


def _points(series: Series) -> list[tuple[Any, float, float, float]]:
    """x, y, low, high of every point that has a place."""
    places: Sequence[str | float] = series.x
    rows = zip_longest(series.y, series.low, series.high)
    return [
        (x, _drawable(y), _drawable(low), _drawable(high))
        for x, (y, low, high) in zip(places, rows, strict=False)
        if isinstance(x, str) or math.isfinite(_drawable(x))
    ]


def _drawable(value: float | None) -> float:
    """The number, or NaN, which matplotlib leaves out; its axes overflow near the end of the floats."""
    if value is None or not abs(value) < 1e100:
        return math.nan
    return value if abs(value) > 1e-100 else 0.0


def _inline(drawn: str, *, prefix: str, label: str) -> str:
    """Matplotlib's document as an element of a page: no size, style sheet, foreign ids or fixed colours."""
    root = ElementTree.fromstring(drawn)  # noqa: S314 - matplotlib has written it just now
    for parent in list(root.iter()):
        for child in list(parent):
            # Its style sheet would reach the whole page.
            if _local(child.tag) in ("metadata", "style"):
                parent.remove(child)
    markup = [(_local(name), value) for element in root.iter() for name, value in element.attrib.items()]
    used = {found for _name, value in markup for found in re.findall(r"url\(#([^)]+)\)", value)}
    used |= {value[1:] for name, value in markup if name == "href"}
    for element in root.iter():
        element.tag = _local(element.tag)
        given = dict(element.attrib)
        element.attrib.clear()
        for name, value in given.items():
            plain = _local(name)
            if plain == "id":
                if value in used:
                    element.set("id", prefix + value)
            elif plain == "href":
                element.set("href", f"#{prefix}{value[1:]}")
            else:
                element.set(plain, _themed(value.replace("url(#", f"url(#{prefix}")))
    root.attrib = {
        "xmlns": "http://www.w3.org/2000/svg",
        "viewBox": root.attrib["viewBox"],
        "width": "100%",
        "role": "img",
        "aria-label": label,
        "style": "stroke-linejoin: round; stroke-linecap: butt",
    }
    return ElementTree.tostring(root, encoding="unicode")


def _themed(value: str) -> str:
    value = re.sub(r"font-family: [^;]*(; )?", "", value)  # the page's own
    for sentinel, (name, otherwise) in COLOURS.items():
        value = value.replace(sentinel, f"var(--{name}, {otherwise})")
    return value


def _local(name: str) -> str:
    return name.rpartition("}")[2]
