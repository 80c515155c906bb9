"""Charts of the report: numbers in, inline SVG out. The only module that imports matplotlib, and only when it draws.

The page is read in a light and a dark scheme, so a chart has no colours of its own: matplotlib draws with marker
colours (`#0c00..`) that are replaced by CSS variables afterwards. Text stays text and takes the page's font. Legends
are HTML below the chart, where they wrap on a phone. Charts are drawn small (4.6 in wide) and scaled up, so that
their type is readable at 360 px.
"""

import hashlib
import html
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NUM_BINS = 80
MAX_POINTS = 400  # of one line; longer ones are thinned
_INK, _GRID = "#0c00f0", "#0c00f1"
_STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "tdds", "text.parse_math": False,
    "font.size": 9.5, "text.color": _INK, "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK,
    "axes.titlesize": 9.5, "axes.titlelocation": "left", "axes.titlepad": 8,
    "axes.edgecolor": _GRID, "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": _GRID, "grid.linewidth": 0.7, "axes.axisbelow": True,
    "xtick.major.size": 3, "ytick.major.size": 0, "ytick.minor.size": 0, "ytick.minor.width": 0,
    "xtick.major.width": 0.7, "lines.linewidth": 1.5, "lines.markersize": 4.5, "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Line:
    """One line of a chart; `slot` is its colour, the CSS variable `--s<slot>`."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    slot: int
    error: Sequence[float] | None = None  # half length of the error bar at each point, 0 for none
    dashed: bool = False
    marker: str = ""  # "o", "s", "^" or none
    opacity: float = 1.0
    title: str = ""  # shown when the pointer rests on the line


def line_chart(lines: Sequence[Line], y_title: str, x_title: str, alt: str, full: float | None = None,
               percent_x: bool = False, may_be_log: bool = False) -> str:
    """Lines over a common x axis, with an optional horizontal line at the full data's value.

    may_be_log: make the y axis logarithmic when all values are positive and span more than a factor of 30.
    percent_x: x holds percent; only the values that occur are labelled.
    """
    values = [y for line in lines for y in line.y]
    log = may_be_log and min(values) > 0 and max(values) / min(values) > 30

    def draw(axes: "Axes") -> None:
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        if full is not None:
            axes.axhline(full, color=_slot(99), linewidth=1, linestyle=(0, (1, 2)))
        for number, line in enumerate(lines):
            x, y = _thin(line.x), _thin(line.y)
            (artist,) = axes.plot(x, y, color=_slot(line.slot), linestyle=(0, (4, 2)) if line.dashed else "-",
                                  alpha=line.opacity, marker=line.marker or ("o" if len(x) == 1 else ""))
            artist.set_gid(f"line-{number}")
            if line.error is not None and any(line.error):
                axes.errorbar(x, y, yerr=line.error, fmt="none", ecolor=_slot(line.slot), elinewidth=1, capsize=2)
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
        if percent_x:
            axes.set_xticks(sorted({round(x, 4) for line in lines for x in line.x}))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        axes.margins(x=0.04, y=0.08)
        axes.set_title(y_title + (" (log axis)" if log else ""))
        axes.set_xlabel(x_title)

    return _render(draw, alt, [line.title or line.label for line in lines])


def histogram(score_N: np.ndarray, cuts: Sequence[tuple[str, float]], slot: int, x_title: str, alt: str) -> str:
    """Binned counts of finite scores [N] on a logarithmic axis; `cuts` are (label, score) flags above it.

    Counting scores (forgetting) get bins around whole numbers, or every other bin would be empty.
    """
    low, high = float(score_N.min()), float(score_N.max())
    whole = high > low and bool((score_N == np.round(score_N)).all())
    bins = np.arange(low - 0.5, high + 1.5, math.ceil((high - low) / NUM_BINS)) if whole else NUM_BINS
    count, edge = np.histogram(score_N, bins=bins)
    cuts = sorted(cuts, key=lambda cut: cut[1])

    def draw(axes: "Axes") -> None:
        from matplotlib.ticker import FuncFormatter, LogLocator

        axes.stairs(np.maximum(count, 0.5), edge, baseline=0.5, fill=True, color=_slot(slot), alpha=0.55, linewidth=0)
        axes.set_yscale("log")
        axes.set_ylim(0.5, max(2, count.max() * 1.6))
        axes.set_xlim(edge[0], edge[-1] + 0.1 * (edge[-1] - edge[0]))  # room for the flag of the last cut
        axes.yaxis.set_major_locator(LogLocator(numticks=6))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
        # The leftmost flag is the tallest: a label stands right of its line, where only lower lines follow.
        # Their room is the padding of the title; the layout must not count it again.
        for number, (label, score) in enumerate(cuts):
            top = 1.03 + 0.088 * (len(cuts) - 1 - number)
            place = axes.get_xaxis_transform()
            (pole,) = axes.plot([score, score], [0, top + 0.06], color=_INK, lw=0.8, transform=place, clip_on=False)
            flag = axes.annotate(label, (score, top), (3, 0), xycoords=place, textcoords="offset points", fontsize=8.5)
            pole.set_in_layout(False)
            flag.set_in_layout(False)
        axes.set_title("images per bin (log axis)", pad=8 + 12 * len(cuts))
        axes.set_xlabel(x_title)

    return _render(draw, alt, [], height=2.5 + 0.17 * len(cuts))


def _slot(slot: int) -> str:
    return f"#0c01{slot:02x}"


def _thin(values: Sequence[float]) -> list[float]:
    """At most about MAX_POINTS values, evenly picked, the last one among them."""
    step = math.ceil(len(values) / MAX_POINTS) or 1
    return list(values[::-1][::step])[::-1]


def _render(draw: Callable[["Axes"], None], alt: str, titles: Sequence[str], height: float = 2.9) -> str:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    file = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.6, height), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure.add_subplot())
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _for_page(file.getvalue(), alt, titles)


def _for_page(svg: str, alt: str, titles: Sequence[str]) -> str:
    """Cut matplotlib's SVG down to what a page needs: no header, fonts or unused ids; colours as variables."""
    svg = svg[svg.index("<svg"):]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    head = re.compile(r'<svg[^>]*?(viewBox="[^"]*")[^>]*>')
    svg = head.sub(lambda match: f'<svg {match[1]} role="img" aria-label="{html.escape(alt)}">', svg, count=1)
    svg = re.sub(r"\s*font-family: [^;\"]*;?", "", svg)
    svg = svg.replace("xlink:href", "href")
    for number, title in enumerate(titles):
        svg = svg.replace(f'<g id="line-{number}">', f"<g><title>{html.escape(title)}</title>")
    used = set(re.findall(r"#(\w+)[\")]", svg))
    prefix = "c" + hashlib.sha256(svg.encode()).hexdigest()[:8]
    svg = re.sub(r' id="([^"]*)"', lambda match: f' id="{prefix}{match[1]}"' if match[1] in used else "", svg)
    svg = re.sub(r"(href=\"|url\()#", rf"\1#{prefix}", svg)
    svg = re.sub(r"#0c01([0-9a-f]{2})", lambda match: f"var(--s{int(match[1], 16)})", svg)
    svg = svg.replace(_INK, "var(--muted)").replace(_GRID, "var(--line)")
    svg = re.sub(r' (?:d|x|y|transform)="[^"]*"', lambda match: re.sub(r"(\.\d\d)\d+", r"\1", match[0]), svg)
    return re.sub(r"\s*\n\s*", " ", svg)
