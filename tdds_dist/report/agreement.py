"""Sections of the report about how scores relate: maps of two of them, agreement within a run and
between runs.

Owns what those sections show; the numbers are those of `agreement`, as in `tdds compare`. Gives
plain values and SVG to the templates in `templates/`.
"""

# N dataset, M kept samples, X and Y cells of a map, P pruning rates

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tdds_dist.config.scores import DEFAULT_RATES, base_key, is_plain
from tdds_dist.coreset import agreement
from tdds_dist.coreset.agreement import Ranked
from tdds_dist.coreset.samplers import num_kept
from tdds_dist.errors import InputError
from tdds_dist.report import charts
from tdds_dist.report.charts import Bins, bins_of
from tdds_dist.report.read import Facts, grouped
from tdds_dist.report.scores import known_noise
from tdds_dist.runs.artifacts import Scores, require_same_dataset
from tdds_dist.text import percent

NUM_CELLS = 60  # of a map in either direction
RIGHT_SLOT, WRONG_SLOT = 0, 1  # colours of images that are right in all epochs, and in none
MAX_MAPPED = 6  # TDDS windows that get maps

# score: (what a high score says of an image, what a low one says)
_MEANING = {
    "tdds": ("of varying effect on training", "of steady or little effect on training"),
    "forgetting": ("forgotten often or never learned", "learned once and kept"),
    "aum": ("hard to tell from another class", "told apart with ease"),
}


def agreement_section(
    facts: Facts, main: str | None, slots: Mapping[str, int]
) -> dict[str, Any] | None:
    """Return maps and matrices of one run; `ranked`, `rates` and `fingerprint` are for
    `between_section`. None without scores.

    A score that is not finite, or of other labels than the others, is left out and named in
    `left_out`.
    """
    usable, left_out = _usable(facts.scores)
    if not usable:
        return None
    fingerprint = next(iter(usable.values())).fingerprint
    rates = _rates(facts, fingerprint.num_samples)
    ranked = agreement.in_order(
        {name: agreement.rank(scores, rates) for name, scores in usable.items()}, facts.config
    )
    return {
        "ranked": ranked,
        "rates": rates,
        "fingerprint": fingerprint,
        "left_out": left_out,
        "maps": [] if main is None else _maps(facts, main, ranked, rates, slots),
        "cartography": _cartography(facts, usable),
        "matrices": _matrices(ranked, rates, fingerprint.num_samples) if len(ranked) > 1 else [],
    }


def _usable(scores: Mapping[str, Scores]) -> tuple[dict[str, Scores], list[str]]:
    usable: dict[str, Scores] = {}
    for name, each in scores.items():
        try:
            require_same_dataset(
                each.fingerprint, next(iter(usable.values()), each).fingerprint, name
            )
        except InputError:
            continue
        if np.isfinite(each.score_N).all():
            usable[name] = each
    return usable, [name for name in scores if name not in usable]


def _rates(facts: Facts, num_samples: int) -> list[float]:
    """Return the pruning rates of the run's coresets, else DEFAULT_RATES; without those that would
    keep nothing."""
    asked = {
        coreset.pruning_rate for coreset in facts.coresets.values() if coreset.pruning_rate > 0
    } or {*DEFAULT_RATES}
    return [rate for rate in sorted(asked) if round(rate * num_samples) < num_samples]


# --------------------------------------------------------------------------------------------------


def _matrices(
    ranked: Mapping[str, Ranked], rates: Sequence[float], num_samples: int
) -> list[dict[str, Any]]:
    """Return one matrix of rank correlations, and one of overlaps for each pruning rate.

    `cells` hold a number as text and its `tint` in [-1, 1]: 0 for what chance would give, 1 for
    equal scores.
    """
    pairs, names = agreement.within_run(ranked), agreement.short_names([*ranked])
    found = []
    for position, rate in enumerate([None, *rates]):
        chance = 0.0 if rate is None else num_kept(num_samples, rate) / num_samples
        value = {pair: values[position] for pair, values in pairs.items()}
        known = {pair: number for pair, number in value.items() if not np.isnan(number)}
        value |= {(b, a): number for (a, b), number in value.items()}
        cells = [
            [None if a == b else _cell(value[a, b], rate, chance) for b in ranked] for a in ranked
        ]
        ends = [reduce(known, key=known.__getitem__) for reduce in (max, min) if len(known) > 1]
        found.append(
            {
                "rate": rate,
                "chance": chance,
                "rows": list(zip(ranked, names.values(), cells, strict=True)),
                "ends": [
                    (names[a], names[b], _cell(known[a, b], rate, chance)[0]) for a, b in ends
                ],
            }
        )
    return found


def _cell(value: float, rate: float | None, chance: float) -> tuple[str, float]:
    """Write a rank correlation with two decimals, or an overlap in whole percent."""
    if np.isnan(value):
        return "–", 0.0
    text = (
        f"{round(value, 2) + 0.0:.2f}".replace("-", "−") if rate is None else f"{100 * value:.0f}"
    )
    room = 1 - chance if value >= chance else chance or 1.0
    return text, round((value - chance) / room, 2) if room else 0.0


def between_section(
    runs: Sequence[tuple[str, dict[str, Any] | None]],
) -> list[dict[str, Any]] | None:
    """Return the agreement of the same score between runs (name, `agreement_section`) of the same
    data, a table for each data set that two runs or more share; None where there is none.

    Overlaps are at the pruning rates that all these runs have. A number is (mean, smallest,
    largest) over the pairs of runs.
    """
    known = [(name, section) for name, section in runs if section is not None]
    found = []
    for fingerprint, members in grouped(known, lambda run: run[1]["fingerprint"]).items():
        rates = sorted(set.intersection(*({*section["rates"]} for _, section in members)))
        ranked = [
            {key: _at(each, section["rates"], rates) for key, each in section["ranked"].items()}
            for _, section in members
        ]
        pairs = agreement.between_runs(ranked)
        if pairs:
            names = agreement.short_names([*pairs])
            found.append(
                {
                    "names": [name for name, _ in members],
                    "num_samples": fingerprint.num_samples,
                    "rates": [
                        (rate, num_kept(fingerprint.num_samples, rate) / fingerprint.num_samples)
                        for rate in rates
                    ],
                    "rows": [
                        (key, names[key], len(of_pair), _spread([*of_pair.values()]))
                        for key, of_pair in pairs.items()
                    ],
                }
            )
    return found or None


def _at(ranked: Ranked, have: Sequence[float], want: Sequence[float]) -> Ranked:
    return Ranked(ranked.rank_N, ranked.kept_PB[[have.index(rate) for rate in want]])


def _spread(of_pair: Sequence[Sequence[float]]) -> list[tuple[float, float, float]]:
    """Return mean, smallest and largest over pairs, of the rank correlation and of the overlap at
    each rate."""
    return list(
        zip(
            *(agreement.over_pairs(reduce, of_pair) for reduce in (np.mean, np.min, np.max)),
            strict=True,
        )
    )


# --------------------------------------------------------------------------------------------------


def _maps(
    facts: Facts,
    main: str,
    ranked: Mapping[str, Ranked],
    rates: Sequence[float],
    slots: Mapping[str, int],
) -> list[dict[str, Any]]:
    """Draw maps of the main score, and of the other TDDS windows, against forgetting and AUM, as
    far as there are such scores.
    """
    others = [name for name in ranked if base_key(name) in ("forgetting", "aum") and is_plain(name)]
    windows = [name for name in ranked if base_key(name) == "tdds" and is_plain(name)]
    mapped = [*dict.fromkeys([main, *(windows if main in windows else [])])][:MAX_MAPPED]
    names = agreement.short_names([*ranked])
    noisy_N, _ = known_noise(facts)
    found = []
    for name in ranked:
        pairs = [other for other in others if other != name]
        if name in mapped and pairs:
            slot = slots[facts.names[name]]
            found.append(
                {
                    "name": names[name],
                    "maps": [
                        _map(
                            facts.scores,
                            (name, names[name]),
                            (other, names[other]),
                            ranked,
                            rates,
                            slot,
                            noisy_N,
                        )
                        for other in pairs
                    ],
                }
            )
    return found


def _map(
    scores: Mapping[str, Scores],
    x: tuple[str, str],
    y: tuple[str, str],
    ranked: Mapping[str, Ranked],
    rates: Sequence[float],
    slot: int,
    noisy_N: np.ndarray | None,
) -> dict[str, Any]:
    """Draw one map; `x` and `y` are file name and short name of a score."""
    x_N, y_N = (scores[name].score_N for name, _ in (x, y))
    x_bins, y_bins = (bins_of(score_N, NUM_CELLS) for score_N in (x_N, y_N))
    cell_N = y_bins.place(y_N) * len(x_bins) + x_bins.place(x_N)
    count_YX = np.bincount(cell_N, minlength=len(y_bins) * len(x_bins)).reshape(
        len(y_bins), len(x_bins)
    )
    x_axis, y_axis = (
        charts.Axis(
            f"{short} score" + (" (log axis)" if bins.is_log else ""),
            bins,
            _cuts(scores[name].score_N, ranked[name], rates),
        )
        for (name, short), bins in ((x, x_bins), (y, y_bins))
    )
    alt = (
        f"Map of {len(x_N):,} images by {x[0]} score and {y[0]} score; Spearman's rank correlation "
        f"{agreement.rank_correlation(ranked[x[0]].rank_N, ranked[y[0]].rank_N):.2f}."
    )
    return {
        "chart": charts.density_map(count_YX, x_axis, y_axis, slot, alt),
        "x": x[1],
        "y": y[1],
        "most": int(count_YX.max()),
        "corners": _corners(x, y, ranked, rates, noisy_N),
    }


def _cartography(facts: Facts, scores: Mapping[str, Scores]) -> dict[str, Any] | None:
    """Draw the map of dataset cartography: variability across, confidence upwards, coloured by how
    many epochs are right; None where one of the three is missing, or of other epochs."""
    keys = ("variability", "confidence", "correctness")
    epochs = {scores[key].settings.get("T") for key in keys if key in scores}
    if not all(key in scores for key in keys) or len(epochs) != 1 or None in epochs:
        return None
    x_N, minus_p_N, minus_right_N = (scores[key].score_N for key in keys)
    y_N, num_epochs = -minus_p_N, epochs.pop()
    x_bins, y_bins = (Bins(np.linspace(0.0, top, NUM_CELLS + 1)) for top in (0.5, 1.0))
    cell_N = y_bins.place(y_N) * NUM_CELLS + x_bins.place(x_N)
    count_C = np.bincount(cell_N, minlength=NUM_CELLS**2)
    right_C = np.bincount(cell_N, -minus_right_N / num_epochs, minlength=NUM_CELLS**2)
    wrong_C = 1 - right_C / np.maximum(count_C, 1)
    count_YX, wrong_YX = (each.reshape(NUM_CELLS, NUM_CELLS) for each in (count_C, wrong_C))
    noisy_N, _ = known_noise(facts)
    low_N = y_N < 0.5
    alt = (
        f"Map of {len(x_N):,} images by variability and confidence over {num_epochs} epochs;"
        f" {int(low_N.sum()):,} have a confidence below 0.5."
    )
    chart = charts.density_map(
        count_YX,
        charts.Axis("variability (standard deviation of the label's probability)", x_bins),
        charts.Axis("confidence (mean of the label's probability)", y_bins),
        RIGHT_SLOT,
        alt,
        (wrong_YX.clip(0, 1), WRONG_SLOT),
    )
    return {
        "chart": chart,
        "num_epochs": num_epochs,
        "legend": [
            charts.Line("right in every epoch", [], [], RIGHT_SLOT),
            charts.Line("right in none", [], [], WRONG_SLOT),
        ],
        "num_low": int(low_N.sum()),
        "num_noisy": None if noisy_N is None else int(noisy_N.sum()),
        "num_noisy_low": None if noisy_N is None else int((noisy_N & low_N).sum()),
    }


def _cuts(score_N: np.ndarray, ranked: Ranked, rates: Sequence[float]) -> list[tuple[str, float]]:
    """Return the lowest score that is kept at each pruning rate; rates that cut at the same one
    share a label."""
    labels: dict[float, list[str]] = {}
    for position, rate in enumerate(rates):
        labels.setdefault(float(score_N[ranked.kept(position)].min()), []).append(percent(rate))
    return [(", ".join(label), cut) for cut, label in labels.items()]


def _corners(
    x: tuple[str, str],
    y: tuple[str, str],
    ranked: Mapping[str, Ranked],
    rates: Sequence[float],
    noisy_N: np.ndarray | None,
) -> dict[str, Any] | None:
    """Count the images in each corner at the largest pruning rate, and those of them with a wrong
    label, and say what the two scores mean there; None where a score has no meaning in plain words.
    """
    of_x, of_y = (_MEANING.get(base_key(name)) for name, _ in (x, y))
    if of_x is None or of_y is None or not rates:
        return None
    (x_high, x_low), (y_high, y_low) = of_x, of_y
    x_N, y_N = (ranked[name].kept(-1) for name, _ in (x, y))  # bool
    corners = [
        ("top right", "both keep", x_N & y_N, f"{y_high}, {x_high}"),
        ("bottom left", "both remove", ~x_N & ~y_N, f"{y_low}, {x_low}"),
        ("top left", f"{y[1]} alone keeps", ~x_N & y_N, ""),
        ("bottom right", f"{x[1]} alone keeps", x_N & ~y_N, ""),
    ]
    return {
        "rate": rates[-1],
        "corners": [
            (
                place,
                who,
                int(in_N.sum()),
                what,
                None if noisy_N is None else int((in_N & noisy_N).sum()),
            )
            for place, who, in_N, what in corners
        ],
    }
