"""The vocabulary of scores: their keys, settings of TDDS and their rules; loads no torch."""

from dataclasses import dataclass

from tdds_dist.errors import InputError

DENSE = "dense"  # of all classes

_TOPK = "topk:"


def parse_storage(storage: str, num_classes: int) -> int | None:
    """Return K of storage "topk:K", None for "dense".

    Raises:
        InputError: neither of the two, or not 1 <= K < C.
    """
    if storage == DENSE:
        return None
    digits = storage.removeprefix(_TOPK)
    if digits == storage or not (digits.isascii() and digits.isdigit() and len(digits) < 10):
        raise InputError(
            f"storage={storage!r} is unknown; use {DENSE!r}, or '{_TOPK}K' with a number K, e.g."
            f" '{_TOPK}64'"
        )
    if not 1 <= int(digits) < num_classes:
        raise InputError(
            f"storage={storage!r}: K must be at least 1 and less than the {num_classes} classes;"
            f" change K, or use {DENSE!r}"
        )
    return int(digits)


PRESETS = ("official", "paper")

# pruning rates that are shown where neither a run nor an option says which
DEFAULT_RATES = (0.3, 0.5, 0.7, 0.8, 0.9)

DELTA_OF_PRESET = {"official": "delta_official", "paper": "delta_paper"}

# What stands in the place of the loss difference in the ablations of section 5.4: scalar of the
# trajectory, absolute or not. `el2n` ("EL2N + outer") puts the EL2N of epoch t where the difference
# into epoch t would be.
ABLATIONS = {
    "kl_signed": ("delta_paper", False),
    "ce": ("delta_ce", False),
    "ce_absolute": ("delta_ce", True),
    "el2n": ("el2n", False),
}

DELTA_KINDS = ("kl", *ABLATIONS)  # kl: what the preset says

SIMPLE_AVERAGE = 0.0  # beta = 0 stands for the plain mean over windows (Fig. 5)


@dataclass(frozen=True)
class Window:
    """One setting of TDDS: trajectory length T (epochs), window size K, EMA decay beta (0: mean
    over windows).

    K counts as in the paper's tables; the preset says whether that means snapshots (`official`, so
    K - 1 loss differences) or loss differences (`paper`).
    """

    T: int
    K: int
    beta: float = 0.9

    def key(self, preset: str, delta: str = "kl") -> str:
        """Return the name of this setting in files, e.g. `tdds_official_T30_K10_beta0.9`, with the
        ablation behind it if it is one."""
        return f"tdds_{preset}_T{self.T}_K{self.K}_beta{self.beta:g}" + (
            "" if delta == "kl" else f"_{delta}"
        )


def differences_per_window(window: Window, preset: str) -> int:
    """Return the number of loss differences in one window."""
    return window.K - 1 if preset == "official" else window.K


def check_window(window: Window, preset: str, num_epochs: int | None = None) -> None:
    """Raise InputError unless the window can be computed, in a run of `num_epochs` epochs where
    that is given."""
    if preset not in PRESETS:
        raise InputError(f"preset={preset!r} is unknown; use one of {', '.join(PRESETS)}")
    if not 0.0 <= window.beta <= 1.0:
        raise InputError(
            f"beta={window.beta} must lie in [0, 1]; the paper uses 0.9, and 0 means a plain"
            " average"
        )
    low, high = (2, window.T) if preset == "official" else (1, window.T - 1)
    if window.T < 2:
        raise InputError(f"T={window.T} is too short for a window; use at least 2 epochs")
    if not low <= window.K <= high:
        raise InputError(
            f"K={window.K} must lie in [{low}, {high}] for T={window.T} and preset {preset!r}; "
            "lower K or raise T"
        )
    if num_epochs is not None and num_epochs < window.T:
        raise InputError(
            f"T={window.T} is longer than the {num_epochs} epochs there are; lower T or train"
            " longer"
        )


def delta_scalar(delta: str, preset: str) -> tuple[str, bool]:
    """Return the scalar of the trajectory that `delta` stands for, and whether its absolute value
    is taken."""
    if delta == "kl":
        return DELTA_OF_PRESET[preset], False  # official: absolute per class already
    if delta not in ABLATIONS:
        raise InputError(f"delta={delta!r} is unknown; use one of {', '.join(DELTA_KINDS)}")
    return ABLATIONS[delta]


def window_settings(window: Window, preset: str, delta: str = "kl") -> dict[str, object]:
    """Return the setting as it stands in score files."""
    setting = {"score": "tdds", "preset": preset, "T": window.T, "K": window.K, "beta": window.beta}
    return setting if delta == "kl" else setting | {"delta": delta}


# display order of the score keys, also where nothing is published
SCORE_KEYS = (
    "tdds",
    "random",
    "entropy",
    "forgetting",
    "el2n",
    "aum",
    "moderate",
    "dyn_unc",
    "dual",
    "csl",
    "confidence",
    "variability",
    "correctness",
    "learning_time",
    "cld",
    "s2l",
    "ccs",
)
SAMPLERS = ("top", "ccs", "centre", "beta", "s2l", "drop")
SAMPLER_OF_SCORE = {"moderate": "centre", "s2l": "s2l"}  # of every other score: top
# what finds wrong labels: higher is more suspicious; the first by benchmarks.wrong_labels
SUSPICIONS = ("aum", "csl", "learning_time", "correctness", "confidence", "el2n")
DEFAULT_SUSPICION = "aum"
CLASS_BALANCED = ("cld",)  # scores that choose class by class unless told otherwise


def base_key(score_key: str) -> str:
    """Return the score behind a key with a suffix: `tdds_T90_K10` -> `tdds`; other keys
    unchanged."""
    found = (
        key
        for key in SCORE_KEYS
        if score_key == key or score_key.startswith((f"{key}_", f"{key}-"))
    )
    return next(found, score_key)


def is_plain(score_key: str) -> bool:
    """Say whether a key stands for the score as the literature has it, not for a variant (another
    delta, sampler, option)."""
    base = base_key(score_key)
    parts = [part for part in score_key.removeprefix(base).split("_") if part]
    if base == "tdds":
        settings = [part for part in parts if part not in ("official", "beta0.9")]
        return not parts or (
            parts[0] == "official"
            and all(part[0] in "TK" and part[1:].isdigit() for part in settings)
        )
    return base in SCORE_KEYS and parts in ([], ["aum"] if base == "ccs" else [])


def score_order(score_key: str) -> tuple[int, str]:
    """Return a sort key that puts scores in the order of SCORE_KEYS, keys that are not known last,
    variants of one together."""
    key = base_key(score_key)
    return (SCORE_KEYS.index(key) if key in SCORE_KEYS else len(SCORE_KEYS), key)
