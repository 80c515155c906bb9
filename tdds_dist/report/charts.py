"""Charts of the report: numbers in, inline SVG out. The only module that imports matplotlib, and
only when it draws.

The page is read in a light and a dark scheme, so a chart has no colours of its own: matplotlib
draws with marker colours (`#0c00..`) that are replaced by CSS variables afterwards. Text stays text
and takes the page's font. Legends are HTML below the chart, where they wrap on a phone. Charts are
drawn small (4.6 in wide) and scaled up, so that their type is readable at 360 px.
"""

import hashlib
import html
import io
import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FULL_SLOT = 99  # colour of the full data: the ink of the page
STRIP_INCHES = 0.19  # height of a coreset's strip
NUM_LEVELS = 5  # of its darkness
BAR_STEP, BARS_WIDTH = 3.0, 12.0  # points between error bars at one place, and over all of them
MAX_POINTS = 400  # of one line; longer ones are thinned
# the median lies below this part of the range, tails aside: the axis is made logarithmic
SKEWED = 0.1
# between the ends of a logarithmic axis, unless MOST_BELOW of the samples would be below it
LARGEST_RATIO = 1e6
MOST_BELOW = 0.05
# share of the samples that may be put into each end bin where they would stretch the axis
TAIL = 0.001
_NUMBER = itertools.count()
_INK, _GRID = "#0c00f0", "#0c00f1"
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tdds",
    "text.parse_math": False,
    "font.size": 9.5,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.edgecolor": _GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "ytick.minor.width": 0,
    "xtick.major.width": 0.7,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
    "lines.solid_capstyle": "round",
}


# ---- bins


@dataclass(frozen=True, eq=False)
class Bins:
    """Edges of B bins; the end bins hold what lies beyond them too."""

    edge: np.ndarray  # float64 [B + 1], ascending
    is_log: bool = False  # of equal width in the logarithm
    is_whole: bool = False  # around whole numbers

    def __len__(self) -> int:
        return len(self.edge) - 1

    def place(self, score_N: np.ndarray) -> np.ndarray:
        """Return the bin of each score, int64 [N]. A bin holds its lower edge; the last one its
        upper edge as well."""
        return np.clip(np.searchsorted(self.edge, score_N, side="right") - 1, 0, len(self) - 1)

    def beyond(self, score_N: np.ndarray) -> tuple[int, int]:
        """Count the scores below the first edge, and above the last one."""
        return int(np.count_nonzero(score_N < self.edge[0])), int(
            np.count_nonzero(score_N > self.edge[-1])
        )


def bins_of(score_N: np.ndarray, num_bins: int) -> Bins:
    """Choose about `num_bins` bins for finite scores [N], at least one of them.

    Scores from 0 up most of which are small (TDDS late in training) get a logarithmic axis over
    about LARGEST_RATIO. On any other axis, TAIL of the samples at either end goes into the end bin
    where it would take half of the axis. Counting scores (forgetting) get bins around whole
    numbers, or every other bin would be empty.
    """
    score_N = score_N.astype(np.float64)
    low, *inner, middle, high = (
        float(value) for value in np.quantile(score_N, [0, TAIL, 1 - TAIL, 0.5, 1])
    )
    if low == high:
        return Bins(np.linspace(low - 0.5, low + 0.5, num_bins + 1))
    whole = bool((score_N == np.round(score_N)).all())
    if low >= 0 and middle - low < SKEWED * (inner[1] - low) and not whole:
        least, few = (
            float(value) for value in np.quantile(score_N[score_N > 0], [TAIL, MOST_BELOW])
        )
        first = max(least, min(few, high / LARGEST_RATIO))
        if first < high:
            edge = np.geomspace(first, high, num_bins + 1)
            edge[[0, -1]] = first, high
            return Bins(edge, is_log=True)
    if 0 < inner[1] - inner[0] < (high - low) / 2:
        low, high = inner
    if whole:
        low, high = math.floor(low), math.ceil(high)
        step = math.ceil((high - low) / num_bins)
        return Bins(np.arange(low - 0.5, high + step, step), is_whole=True)
    return Bins(np.linspace(low, high, num_bins + 1))


# ---- charts


@dataclass(frozen=True)
class Line:
    """One line of a chart; `slot` is its colour, the CSS variable `--s<slot>`."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    slot: int
    # half the length of the error bar at each point, 0 for none
    error: Sequence[float] | None = None
    dashed: bool = False
    marker: str = ""  # "o", "s", "^" or none
    opacity: float = 1.0
    title: str = ""  # shown when the pointer rests on the line
    series: str = ""  # lines of one series are shown and hidden together (page.js)
    width: float = 1.5  # points


def points_text(lines: Iterable[Line], form: str) -> str:
    """Write the points of lines; `form` takes y and x of each: "{:.2f} at {:g}"."""
    texts = []
    for line in lines:
        points = [form.format(y, x) for x, y in zip(line.x, line.y, strict=True)]
        texts.append(f"{line.label}: {', '.join(points)}")
    return "; ".join(texts)


def line_chart(
    lines: Sequence[Line],
    y_title: str,
    x_title: str,
    alt: str,
    full: float | None = None,
    ticks: str = "",
    may_be_log: bool = False,
    y_range: tuple[float, float] | None = None,
    marks: Sequence[float] = (),
    from_zero: bool = False,
) -> str:
    """Draw lines over a common x axis, with an optional horizontal line at the full data's value,
    vertical ones at `marks`.

    may_be_log: make the y axis logarithmic when all values are positive and span more than a factor
    of 30. ticks: label the values of x that occur, and no others, in this form ("{:g} %"). y_range:
    lowest and highest value of all charts that are to be compared with this one.
    """
    values = [y for line in lines for y in line.y]
    low, high = y_range or (min(values), max(values))
    log = may_be_log and low > 0 and high / low > 30

    def draw(axes: "Axes") -> None:
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        if full is not None:
            axes.axhline(full, color=_slot(FULL_SLOT), linewidth=1, linestyle=(0, (1, 2)))
        _draw_lines(axes, lines)
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
        if ticks:
            axes.set_xticks(sorted({round(x, 4) for line in lines for x in line.x}))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: ticks.format(value)))
        for mark in marks:
            axes.axvline(mark, color=_INK, linewidth=0.9, linestyle=(0, (2, 2)))
        axes.margins(x=0.04, y=0.08)
        if y_range is not None:
            axes.update_datalim([(lines[0].x[0], low), (lines[0].x[0], high)])
            axes.autoscale_view()
        if from_zero:
            axes.set_ylim(bottom=0)
        axes.set_title(y_title + (" (log axis)" if log else ""))
        axes.set_xlabel(x_title)

    return _render(
        draw,
        alt,
        [line.title or line.label for line in lines],
        series=[line.series for line in lines],
    )


def _draw_lines(axes: "Axes", lines: Sequence[Line]) -> None:
    """Draw lines with their error bars; those that have some stand side by side, a few points
    apart, or bars would hide each other."""
    from matplotlib.transforms import ScaledTranslation

    with_bars = [number for number, line in enumerate(lines) if any(line.error or ())]
    for number, line in enumerate(lines):
        x, y = (
            _thin(values, MAX_POINTS // 5 if line.width < 1 else MAX_POINTS)
            for values in (line.x, line.y)
        )
        place = axes.transData
        if number in with_bars:
            step = min(BAR_STEP, BARS_WIDTH / len(with_bars))
            points = step * (with_bars.index(number) - (len(with_bars) - 1) / 2)
            place += ScaledTranslation(points / 72, 0, axes.figure.dpi_scale_trans)
        (artist,) = axes.plot(
            x,
            y,
            transform=place,
            color=_slot(line.slot),
            linestyle=(0, (4, 2)) if line.dashed else "-",
            alpha=line.opacity,
            marker=line.marker or ("o" if len(x) == 1 else ""),
            markevery=max(1, len(x) // 8),
            linewidth=line.width,
        )
        artist.set_gid(f"line-{number}")
        if number in with_bars:
            bars = axes.errorbar(
                x,
                y,
                yerr=line.error,
                transform=place,
                fmt="none",
                ecolor=_slot(line.slot),
                elinewidth=1,
                capsize=2,
            )
            for part in (*bars.lines[1], *bars.lines[2]):
                part.set_gid(f"bars-{number}")
    for line in (lines[number] for number in with_bars):  # moved, it does not count by itself
        for sign in (-1, 1):
            axes.update_datalim(np.column_stack([line.x, line.y + sign * np.array(line.error)]))


@dataclass(frozen=True, eq=False)
class Strip:
    """One coreset below a histogram: the share of each bin that it keeps, and its cut."""

    label: str
    share_B: np.ndarray  # in [0, 1]; nan for a bin without images
    cuts: Sequence[float] = ()


def histogram(
    count_B: np.ndarray, bins: Bins, strips: Sequence[Strip], slot: int, x_title: str, alt: str
) -> str:
    """Draw counts per bin on a logarithmic axis; below it a strip per coreset, the darker the more
    of the bin is kept."""
    edge = bins.edge

    def draw(axes: "Axes") -> None:
        from matplotlib.ticker import FuncFormatter, LogLocator

        figure, lowest = axes.figure, axes
        if strips:
            axes.remove()
            axes, lowest = figure.subplots(
                2, 1, sharex=True, height_ratios=[2.1, STRIP_INCHES * len(strips)]
            )
            _draw_strips(lowest, edge, strips, slot)
            axes.spines["bottom"].set_visible(False)
            axes.tick_params(axis="x", which="both", length=0)
        axes.stairs(
            np.maximum(count_B, 0.5),
            edge,
            baseline=0.5,
            fill=True,
            color=_slot(slot),
            alpha=0.55,
            linewidth=0,
        )
        for cut in sorted({cut for strip in strips for cut in strip.cuts}):
            axes.axvline(cut, color=_INK, linewidth=0.7, linestyle=(0, (2, 2)))
        axes.set_yscale("log")
        axes.set_ylim(0.5, max(2, count_B.max() * 1.6))
        axes.yaxis.set_major_locator(LogLocator(numticks=6))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
        axes.set_title("images per bin (log axis)")
        if bins.is_log:
            lowest.set_xscale("log")
            lowest.xaxis.set_major_locator(LogLocator(numticks=7))
            lowest.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            lowest.xaxis.set_minor_locator(LogLocator(subs=(2, 5), numticks=99))
            lowest.xaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
        lowest.set_xlim(edge[0], edge[-1])
        lowest.set_xlabel(x_title)

    return _render(draw, alt, [], height=2.5 + (0.1 + STRIP_INCHES * len(strips) if strips else 0))


def _draw_strips(axes: "Axes", edge: np.ndarray, strips: Sequence[Strip], slot: int) -> None:
    for row, strip in enumerate(strips):
        axes.broken_barh(
            [(edge[0], edge[-1] - edge[0])],
            (row - 0.36, 0.72),
            color=_GRID,
            alpha=0.55,
            linewidth=0,
        )
        known = np.flatnonzero(~np.isnan(strip.share_B))
        # no gaps at bins without images
        share_B = np.interp(np.arange(len(strip.share_B)), known, strip.share_B[known])
        level_B = np.rint(share_B * NUM_LEVELS).astype(int)
        first = np.flatnonzero(np.diff(level_B, prepend=-1))
        for start, end in zip(first, [*first[1:], len(level_B)], strict=True):
            if level_B[start]:
                axes.broken_barh(
                    [(edge[start], edge[end] - edge[start])],
                    (row - 0.36, 0.72),
                    color=_slot(slot),
                    alpha=level_B[start] / NUM_LEVELS,
                    linewidth=0,
                )
    axes.set_yticks(range(len(strips)), [strip.label for strip in strips], fontsize=8.5)
    axes.set_ylim(len(strips) - 0.5, -0.5)
    axes.grid(visible=False)


class Axis(NamedTuple):
    """An axis of a map, with (label, score) cuts that are drawn as lines."""

    title: str
    bins: Bins
    cuts: Sequence[tuple[str, float]] = ()


def density_map(
    count_YX: np.ndarray,
    x: Axis,
    y: Axis,
    slot: int,
    alt: str,
    other: tuple[np.ndarray, int] | None = None,
) -> str:
    """Draw the images per cell of two scores, dark where there are many (log scale).

    `other` is the share of each cell, in [0, 1], that is painted in another colour, and its slot.
    """
    x_edge, y_edge = (
        np.log10(bins.edge) if bins.is_log else bins.edge for bins in (x.bins, y.bins)
    )
    opacity_YX = np.where(
        count_YX, 0.14 + 0.86 * np.log1p(count_YX) / math.log1p(max(1, count_YX.max())), 0
    )
    layers = [(opacity_YX, slot)]
    if other is not None:
        share_YX, other_slot = other
        layers = [(opacity_YX * (1 - share_YX), slot), (opacity_YX * share_YX, other_slot)]

    def draw(axes: "Axes") -> None:
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        for layer_YX, _ in layers:
            picture = np.full((*layer_YX.shape, 4), 255, np.uint8)
            picture[..., 3] = np.rint(255 * layer_YX)
            axes.imshow(
                picture,
                origin="lower",
                interpolation="none",
                aspect="auto",
                extent=(x_edge[0], x_edge[-1], y_edge[0], y_edge[-1]),
            )
        axes.set_xlim(x_edge[0], x_edge[-1])
        axes.set_ylim(y_edge[0], y_edge[-1])
        for axis, (_, bins, cuts) in ((axes.xaxis, x), (axes.yaxis, y)):
            axis.set_major_locator(MaxNLocator(nbins=7, integer=bins.is_log or bins.is_whole))
            if bins.is_log:
                axis.set_major_formatter(FuncFormatter(lambda value, _: f"{10**value:g}"))
            if bins.is_whole:  # the images equal to a cut are one row of cells
                cuts = [
                    (label, float(bins.edge[bins.place(np.array([cut]))[0]])) for label, cut in cuts
                ]
            if bins.is_log:
                cuts = [(label, math.log10(max(cut, bins.edge[0]))) for label, cut in cuts]
            _draw_cuts(axes, axis is axes.xaxis, cuts)
        axes.grid(visible=False)
        axes.set_title(y.title, pad=16 if x.cuts else 8)
        axes.set_xlabel(x.title)

    return _in_slots(_render(draw, alt, [], height=3.4), [slot for _, slot in layers])


def _draw_cuts(axes: "Axes", is_x: bool, cuts: Sequence[tuple[str, float]]) -> None:
    """Draw lines across the map; their labels stand outside, moved apart where they would touch."""
    cuts = sorted(cuts, key=lambda cut: cut[1])
    for _, place in cuts:
        (axes.axvline if is_x else axes.axhline)(
            place, color=_INK, linewidth=0.8, linestyle=(0, (2, 2))
        )
    limits, gap = (axes.get_xlim(), 0.09) if is_x else (axes.get_ylim(), 0.052)
    share = [(place - limits[0]) / (limits[1] - limits[0]) for _, place in cuts]
    for number in range(1, len(share)):
        share[number] = max(share[number], share[number - 1] + gap)
    for number in reversed(range(len(share))):
        share[number] = min(share[number], 1 - gap * (len(share) - 1 - number))
    for (label, _), place in zip(cuts, share, strict=True):
        at, offset = ((place, 1), (0, 3)) if is_x else ((1, place), (3, 0))
        text = axes.annotate(
            label,
            at,
            offset,
            xycoords="axes fraction",
            textcoords="offset points",
            fontsize=8,
            ha="center" if is_x else "left",
            va="bottom" if is_x else "center",
        )
        text.set_in_layout(not is_x)  # above the map they stand in the title's padding


def _in_slots(svg: str, slots: Sequence[int]) -> str:
    """Paint the opacity of each picture in a colour of the page: the picture becomes the mask of a
    coloured area."""
    key, left = hashlib.sha256(svg.encode()).hexdigest()[:8], iter(slots)

    def paint(match: re.Match[str]) -> str:
        name = f"m{key}-{(slot := next(left))}"
        area = f'<rect width="100%" height="100%" fill="var(--s{slot})" mask="url(#{name})"/>'
        return f'<mask id="{name}">{match[0]}</mask>{area}'

    return re.sub(r"<image [^>]*/>", paint, svg)


def _slot(slot: int) -> str:
    return f"#0c01{slot:02x}"


def _thin(values: Sequence[float], most: int = MAX_POINTS) -> list[float]:
    """Return at most about `most` values, evenly picked, the last one among them."""
    step = math.ceil(len(values) / most) or 1
    return list(values[::-1][::step])[::-1]


def _render(
    draw: Callable[["Axes"], None],
    alt: str,
    titles: Sequence[str],
    height: float = 2.9,
    series: Sequence[str] = (),
) -> str:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    file = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.6, height), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure.add_subplot())
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _for_page(file.getvalue(), alt, titles, series)


def _for_page(svg: str, alt: str, titles: Sequence[str], series: Sequence[str] = ()) -> str:
    """Cut matplotlib's SVG down to what a page needs: no header, fonts or unused ids; colours as
    variables.

    Line number i gets title i, for the pointer, and with its error bars series i, for the script.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    head = re.compile(r'<svg[^>]*?(viewBox="[^"]*")[^>]*>')
    svg = head.sub(
        lambda match: f'<svg {match[1]} role="img" aria-label="{html.escape(alt)}">', svg, count=1
    )
    svg = re.sub(r"\s*font-family: [^;\"]*;?", "", svg)
    svg = svg.replace("xlink:href", "href")
    for number, title in enumerate(titles):
        key = f' data-series="{html.escape(series[number])}"' if series and series[number] else ""
        svg = svg.replace(f'<g id="line-{number}">', f"<g{key}><title>{html.escape(title)}</title>")
        svg = svg.replace(f'<g id="bars-{number}">', f"<g{key}>")
    used = set(re.findall(r"#(\w+)[\")]", svg))
    # two charts may be alike, and one of them hidden: each has ids of its own
    prefix = f"c{next(_NUMBER)}-"
    svg = re.sub(
        r' id="([^"]*)"', lambda match: f' id="{prefix}{match[1]}"' if match[1] in used else "", svg
    )
    svg = re.sub(r"(href=\"|url\()#", rf"\1#{prefix}", svg)
    svg = re.sub(r"#0c01([0-9a-f]{2})", lambda match: f"var(--s{int(match[1], 16)})", svg)
    svg = svg.replace(_INK, "var(--muted)").replace(_GRID, "var(--line)")
    svg = re.sub(
        r' (?:d|x|y|transform)="[^"]*"', lambda match: re.sub(r"(\.\d\d)\d+", r"\1", match[0]), svg
    )
    return re.sub(r"\s*\n\s*", " ", svg)
