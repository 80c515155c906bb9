"""Section of the report about ablations: retrainings that differ in one setting, drawn over it or
over the pruning rate, and how far their coresets overlap.

Owns which figures there are. They follow from the settings of the retrainings alone, so that an
experiment of any user has them without asking; those of the paper's Figures 1 and 4 to 7 come out
of the same rules. Gives plain values and SVG to the templates in `templates/`.
"""

# M kept samples

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tdds_dist.config.scores import DELTA_KINDS, base_key
from tdds_dist.report import charts
from tdds_dist.report.read import Facts, Retrained, grouped, with_several
from tdds_dist.report.results import by_setting, variants
from tdds_dist.runs.artifacts import Coreset
from tdds_dist.text import mean_std, percent

_WINDOW = ("T", "K")
_MARKERS = ("o", "s", "^")
_CHANCE_SLOT = 98  # a grey
# what retrainings may differ in: how a coreset's settings (`importance`: the retraining's) call it,
# the title of the figure, and the usual value, which others are compared with
_AXES: dict[str, tuple[str, Any]] = {
    "T": ("Epochs that the score looks at", None),
    "K": ("", None),
    "beta": ("Average over windows", 0.9),
    "delta": ("What varies in a window", "kl"),
    "preset": ("Preset", "official"),
    "J": ("Window J", 10),
    "never_learned": ("Forgetting of what was never learned", "inf"),
    "aum_of": ("What the margin is of", "logit"),
    "keep": ("Which end is kept", "hardest"),
    "class_balanced": ("The same share of every class", False),
    "num_clusters": ("Number of clusters", 100),
    "num_strata": ("Number of strata", 50),
    "own_hard_cutoff_rate": ("Hard cutoff", None),
    "c_d": ("Peak of the weighted draw", 4.0),
    "importance": ("Weight of the loss in retraining", None),
}
_DELTA = {
    "kl_signed": "signed KL",
    "ce": "signed CE",
    "ce_absolute": "absolute CE",
    "el2n": "EL2N",
}
_IMPORTANCE = ("batch", "none", "sample")


@dataclass(frozen=True)
class _Trained:
    """One finished retraining: `setting` by the names of _AXES, `rest` what must agree besides."""

    setting: dict[str, Any]
    rest: tuple[Any, ...]  # score, sampler, strategy, network, variant, epochs
    rate: float
    run: Path
    seed: Any
    top1: float
    coreset: Coreset | None

    @property
    def score(self) -> str:
        return str(self.rest[0])

    @property
    def window(self) -> tuple[Any, ...]:
        return tuple(self.setting[name] for name in _WINDOW)


def ablations(pool: Sequence[Facts]) -> list[dict[str, Any]]:
    """Draw every setting in which retrainings of the same data differ while all else agrees.

    TDDS at several (T, K): top-1 over T, a line per K, a chart per pruning rate. Any other setting:
    top-1 over the pruning rate, a line per value, and the overlap of the coresets with that of the
    usual value. Each figure has `title`, `charts` (SVG), `legend`, `reference` (the value that the
    overlaps are with, None without them) and `has_seeds`.
    """
    found = []
    for label, group in by_setting(pool):
        trained = _trained(group)
        for score in dict.fromkeys(one.score for one in trained):
            members = [one for one in trained if one.score == score]
            for figure in _of_score(members, score == "tdds"):
                figure["title"] += f", in {label}" if label else ""
                found.append(figure)
    return found


def _of_score(members: list[_Trained], is_tdds: bool) -> Iterator[dict[str, Any]]:
    free = _WINDOW if is_tdds else ()
    for family in _families(members, free) if is_tdds else ():
        if figure := _windows(family):
            yield figure
    for axis in _AXES:
        for family in () if axis in free else _families(members, (axis, *free)):
            for window, compared in _comparable(family, axis, free):
                values = sorted({one.setting[axis] for one in compared}, key=_order(axis))
                # each other delta is a question of its own: signed or absolute, KL or CE
                pairs = axis == "delta" and len(values) > 2
                for chosen in [[values[0], other] for other in values[1:]] if pairs else [values]:
                    yield _over_rates(compared, axis, chosen, window)


# ---- which retrainings belong together


def _trained(group: Sequence[Facts]) -> list[_Trained]:
    """List the finished retrainings on coresets; of several that agree in everything, one."""
    found: dict[tuple[Any, ...], _Trained] = {}
    variant = variants(group)
    for facts in group:
        for sub in facts.retrained:
            top1, rate = sub.setting.get("final_top1"), sub.setting.get("pruning_rate")
            if not rate or top1 is None:
                continue
            chosen, coreset = _coreset(facts, sub)
            score = str(chosen.get("score") or base_key(sub.setting.get("method", sub.score)))
            importance = sub.setting.get("importance") or "none"
            setting = {name: chosen.get(name, usual) for name, (_, usual) in _AXES.items()}
            strategy = sub.strategy
            one = _Trained(
                setting | {"importance": importance},
                (
                    score,
                    chosen.get("sampler"),
                    strategy,
                    sub.setting.get("network"),
                    variant[facts.run.path, sub.name],
                    sub.setting.get("epochs") if strategy == "E" else None,
                ),
                rate,
                facts.run.path,
                sub.setting.get("seed"),
                top1,
                coreset,
            )
            key = (*one.setting.values(), one.rest, rate, one.run, one.seed)
            found.setdefault(key, one)
    return [*found.values()]


def _coreset(facts: Facts, sub: Retrained) -> tuple[dict[str, Any], Coreset | None]:
    """Return the settings of the coreset that a retraining was on, and the coreset where it is
    still there."""
    record = sub.result or {}
    coreset = facts.coresets.get(Path(str(record.get("coreset", ""))).stem)
    chosen = record.get("coreset_settings")
    if not isinstance(chosen, dict):
        return (coreset.settings, coreset) if coreset else ({}, None)
    return chosen, coreset if coreset and coreset.settings == chosen else None


def _families(members: Sequence[_Trained], free: Sequence[str]) -> list[list[_Trained]]:
    """Group those that agree in all settings but `free`."""

    def fixed(one: _Trained) -> tuple[Any, ...]:
        return one.rest, *(value for name, value in one.setting.items() if name not in free)

    return [*grouped(members, fixed).values()]


def _comparable(
    family: Sequence[_Trained], axis: str, free: Sequence[str]
) -> Iterator[tuple[str, list[_Trained]]]:
    """Yield those of a family that another value of `axis` can be compared with: at the same rate,
    and the same (T, K) where these are `free`.

    Each pruning rate may have a (T, K) of its own; where a rate has several, each is a group by
    itself, with its name.
    """

    def place(one: _Trained) -> tuple[Any, ...]:
        return (one.rate, *(one.window if free else ()))

    compared = with_several((place(one), one.setting[axis]) for one in family)
    kept = [one for one in family if place(one) in compared]
    if not with_several((one.rate, place(one)) for one in kept):
        yield from [("", kept)] if kept else []
        return
    for window in sorted({one.window for one in kept}):
        yield "T = {}, K = {}".format(*window), [one for one in kept if one.window == window]


# ---- figures


def _windows(family: Sequence[_Trained]) -> dict[str, Any] | None:
    """Draw top-1 over T, a line per K and a chart per pruning rate; over K, a line per T, where no
    K has several T. None where nothing has a line."""
    for over, per in (_WINDOW, _WINDOW[::-1]):
        lines = with_several(((one.rate, one.setting[per]), one.setting[over]) for one in family)
        drawn = sorted({rate for rate, _ in lines})
        points: dict[tuple[float, Any], list[_Trained]] = {}
        for one in family:
            points.setdefault((one.rate, one.setting[per]), []).append(one)
        values = sorted({value for rate, value in points if rate in drawn})
        figure = _figure("Trajectory length T and window K", family[0], _WINDOW)
        for rate in drawn:
            made = [
                _line(f"{per} = {value}", number, points[rate, value], over)
                for number, value in enumerate(values)
                if (rate, value) in points
            ]
            _add(figure, made, f"{percent(rate)} removed: final top-1 (%)", over)
        if drawn:
            return figure
    return None


def _over_rates(
    family: Sequence[_Trained], axis: str, values: Sequence[Any], window: str
) -> dict[str, Any]:
    """Draw top-1 over the pruning rate, a line per value; then the overlaps, unless `axis` leaves
    the coresets as they are."""
    by_value = {value: [one for one in family if one.setting[axis] == value] for value in values}
    names = {value: _label(axis, value, family[0].setting["preset"]) for value in values}
    title = _AXES[axis][0]
    if axis == "delta":
        title += ": " + " against ".join(names.values())
    figure = _figure(title, family[0], (axis, *_WINDOW), window)
    made = {
        value: _line(names[value], number, by_value[value], "rate")
        for number, value in enumerate(values)
    }
    _add(figure, [*made.values()], "final top-1 (%)", "rate")
    usual = _AXES[axis][1]
    reference = usual if usual in values else values[0]
    overlaps = [
        replace(made[value], x=[100 * rate for rate in shares], y=mean, error=error)
        for value in values
        if value != reference
        for shares in [_overlap(by_value[reference], by_value[value])]
        for mean, error in [_spread([*shares.values()])]
        if shares
    ]
    if overlaps and axis != "importance":
        rates = sorted({x for line in overlaps for x in line.x})
        chance = charts.Line(
            "by chance",
            rates,
            [100 - rate for rate in rates],
            _CHANCE_SLOT,
            dashed=True,
        )
        title = f"coreset in common with {names[reference]} (%)"
        _add(figure, [*overlaps, chance], title, "rate")
        figure["reference"] = names[reference]
    return figure


def _overlap(reference: Sequence[_Trained], other: Sequence[_Trained]) -> dict[float, list[float]]:
    """Return the percent of a coreset that is in that of the reference too, one for each
    collection, by pruning rate."""
    coreset = {(one.run, one.rate): one.coreset for one in reference}
    shares: dict[float, dict[Path, float]] = {}
    for one in sorted(other, key=lambda one: one.rate):
        usual, of_run = coreset.get((one.run, one.rate)), shares.get(one.rate, {})
        if one.coreset is not None and usual is not None and one.run not in of_run:
            both = np.intersect1d(one.coreset.index_M, usual.index_M, assume_unique=True)
            share = 100 * len(both) / len(one.coreset.index_M)
            shares[one.rate] = of_run | {one.run: share}
    return {rate: [*of_run.values()] for rate, of_run in shares.items()}


def _line(label: str, number: int, members: Sequence[_Trained], over: str) -> charts.Line:
    """Make a line of mean top-1, with the standard deviation over seeds; the looks follow from its
    number."""
    points: dict[float, list[float]] = {}
    for one in members:
        place = 100 * one.rate if over == "rate" else one.setting[over]
        points.setdefault(place, []).append(one.top1)
    x = sorted(points)
    mean, error = _spread([points[place] for place in x])
    return charts.Line(
        label,
        x,
        mean,
        1 + number % 9,
        error,
        dashed=number % (2 * len(_MARKERS)) >= len(_MARKERS),
        marker=_MARKERS[number % len(_MARKERS)],
        series=f"f{number}",
    )


def _spread(values: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Return means, and standard deviations (0 of a single value)."""
    pairs = [mean_std(of_seeds) for of_seeds in values]
    return [mean or 0.0 for mean, _ in pairs], [std or 0.0 for _, std in pairs]


def _figure(title: str, one: _Trained, told: Sequence[str], window: str = "") -> dict[str, Any]:
    """Start a figure; its title names what all its lines share, where that is not the usual."""
    _, sampler, strategy, network, variant, _ = one.rest
    usual = {name: value for name, (_, value) in _AXES.items()}
    usual["importance"] = "batch" if one.score == "tdds" else "none"
    shared = [
        one.score,
        window,
        strategy == "P" and "Strategy-P",
        sampler in ("ccs", "beta", "drop") and f"sampler {sampler}",
        network and f"on {network}",
        variant,
        *(
            _label(name, value, one.setting["preset"])
            for name, value in one.setting.items()
            if name not in (*told, *_WINDOW) and value != usual[name]
        ),
    ]
    return {
        "title": f"{title} ({', '.join(part for part in shared if part)})",
        "charts": [],
        "legend": [],
        "reference": None,
        "has_seeds": False,
    }


def _add(figure: dict[str, Any], lines: Sequence[charts.Line], title: str, over: str) -> None:
    """Add a chart to a figure."""
    form, x_title = ("{:g} %", "images removed") if over == "rate" else ("{:g}", f"{over} (epochs)")
    numbers = charts.points_text(lines, f"{{:.2f}} at {form}")
    alt = f"{figure['title']}, {title} by {x_title}. {numbers}."
    figure["charts"].append(charts.line_chart(lines, title, x_title, alt, ticks=form))
    known = {line.label for line in figure["legend"]}
    figure["legend"] += [line for line in lines if line.label not in known]
    figure["has_seeds"] |= any(any(line.error or ()) for line in lines)


def _label(axis: str, value: Any, preset: str) -> str:
    """Name a value of an axis in a legend."""
    if axis == "delta":
        return _DELTA.get(value, "absolute KL" if preset == "official" else "signed KL")
    if axis == "beta":
        return f"beta = {value:g}" if value else "simple average"
    if axis == "class_balanced":
        return "class-balanced" if value else "not class-balanced"
    if axis == "T":
        return f"first {value} epochs"
    if axis == "own_hard_cutoff_rate":
        return "cutoff of the rate" if value is None else f"cutoff = {value:g}"
    names = {"never_learned": "never learned:", "aum_of": "", "num_strata": "strata:"}
    return f"{names.get(axis, axis)} {value}".strip()


def _order(axis: str) -> Callable[[Any], Any]:
    """Return the sort key of the values of an axis: numbers by size, words as they are listed."""
    listed = {"delta": DELTA_KINDS, "importance": _IMPORTANCE}.get(axis, ())

    def order(value: Any) -> tuple[Any, ...]:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return 0, value
        return 1, listed.index(value) if value in listed else len(listed), str(value)

    return order
