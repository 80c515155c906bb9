"""The content of a run directory, each file read once, for tables and the report.

Owns the reading, not the formats of what it reads. A damaged or foreign file becomes a sentence in
`Facts.problems` instead of an exception: reports are also made of unfinished runs.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tdds_dist.config.scores import base_key, is_plain, score_order
from tdds_dist.coreset.agreement import in_order
from tdds_dist.errors import InputError
from tdds_dist.report.published import Images, images_of
from tdds_dist.runs.artifacts import (
    Coreset,
    Fingerprint,
    Scores,
    load_coreset,
    load_scores,
    require_same_dataset,
)
from tdds_dist.runs.directory import RunDir, read_objects

_T = TypeVar("_T")
_K = TypeVar("_K", bound=Hashable)

FULL_DATA = "full data"
_SETTING_KEYS = (
    "strategy",
    "importance",
    "pruning_rate",
    "method",
    "row",
    "model",
    "variant",
    "network",  # what older runs call a variant
)


@dataclass(frozen=True)
class Retrained:
    """One retraining run; `setting` holds what it was asked for, `result` is None until it
    finishes."""

    name: str
    setting: dict[str, Any]
    result: dict[str, Any] | None
    metrics: list[dict[str, Any]]
    env: dict[str, Any]
    config: dict[str, Any]

    @property
    def score(self) -> str:
        """Return the score and the way of choosing by it; FULL_DATA where nothing was pruned; with
        the network where that is another than the collection's."""
        name = self.setting.get("row") or self.setting.get("method", "?")
        name = FULL_DATA if self.setting.get("pruning_rate") == 0 else name
        return f"{name} on {self.setting['network']}" if self.setting.get("network") else name

    @property
    def strategy(self) -> str | None:
        """Return `E` or `P`."""
        return self.setting.get("strategy")


@dataclass(frozen=True)
class Facts:
    """Everything that was read from one run directory, each file once.

    `scores` and `coresets` are by file name; `names` gives each score key a short name to show,
    e.g. `tdds` for `tdds_official_T30_K10_beta0.9`, where no other window of it serves the same
    pruning rate.
    """

    run: RunDir
    config: dict[str, Any]
    env: dict[str, Any]
    metrics: list[dict[str, Any]]
    result: dict[str, Any] | None
    retrained: list[Retrained]
    scores: dict[str, Scores]
    coresets: dict[str, Coreset]
    manifest: Any  # data.manifest.Manifest, or None when there is none
    num_images: int | None  # of the collection
    images: Images | None  # of the paper
    names: dict[str, str]
    problems: list[str]

    @property
    def is_pruned_training(self) -> bool:
        """Say whether it is a run of `tdds train`, not of `tdds collect`."""
        return (self.env or self.result or {}).get("stage") == "train"


def read_facts(run: RunDir) -> Facts:
    """Read one run directory; raise InputError when it is none."""
    config, problems = run.read_config(), list[str]()
    scores: dict[str, Scores] = {}
    coresets: dict[str, Coreset] = {}
    for path in sorted(run.scores.glob("*.npz")):
        try:
            scores[path.stem] = load_scores(path)
        except InputError as error:
            problems.append(str(error))
    data = config.get("data", {})
    if data.get("train"):
        # a damaged env.json is said below
        with suppress(ValueError, OSError, AttributeError):
            data["train"] = str(run.train_file())
    manifest = _read_manifest(data.get("train"), problems)
    env, result = _read_env(run, problems), _read_record(run.read_result, run.result_file, problems)
    own = _own_dataset(scores, (result or {}).get("num_images"), manifest)
    for name in [*scores]:
        if own is not None and (
            problem := _other_dataset(scores[name].fingerprint, own, run.scores / f"{name}.npz")
        ):
            problems.append(problem)
            del scores[name]
    for path in sorted(run.coresets.glob("*.npz")):
        try:
            coreset = load_coreset(path)
            if own is not None:
                require_same_dataset(coreset.fingerprint, own, str(path))
            coresets[path.stem] = coreset
        except InputError as error:
            problems.append(str(error))
    scores = in_order(scores, config)
    coresets = dict(
        sorted(
            coresets.items(),
            key=lambda item: (*score_order(item[1].score_key), item[1].pruning_rate),
        )
    )
    model = str(config.get("model", {}).get("name", ""))
    sizes = [
        (result or {}).get("num_images"),
        *(score.fingerprint.num_samples for score in scores.values()),
    ]
    num_images = next((size for size in sizes if size is not None), None)
    images = images_of(
        str(data.get("train", "")), int(data.get("num_classes") or 0), manifest, num_images
    )
    retrained = sorted(
        (_read_retrained(sub, model, problems) for sub in run.retrain_runs()), key=_retrained_order
    )
    return Facts(
        run,
        config,
        env,
        _read_metrics(run),
        result,
        retrained,
        scores,
        coresets,
        manifest,
        num_images,
        images,
        _short_names([*scores], retrained),
        problems,
    )


def _retrained_order(sub: Retrained) -> tuple[Any, ...]:
    rate, importance = sub.setting.get("pruning_rate"), sub.setting.get("importance")
    setting = (*score_order(sub.score), str(sub.strategy), str(importance))
    return rate != 0, *setting, rate or 0, sub.name


def score_names(pool: Sequence[Facts]) -> dict[str, str]:
    """Return `Facts.names` of several runs that are shown together."""
    if len(pool) == 1:
        return pool[0].names
    return _short_names(
        [*dict.fromkeys(key for facts in pool for key in facts.scores)],
        [sub for facts in pool for sub in facts.retrained],
    )


def _short_names(keys: list[str], retrained: list[Retrained]) -> dict[str, str]:
    """Return a name to show for each score key: the score alone, unless two of its settings compete
    at one pruning rate, or the key is of a variant."""

    def family(key: str) -> str:
        return base_key(key) + ("_balanced" if key.endswith("_balanced") else "")

    def setting(sub: Retrained) -> tuple[Any, ...]:
        asked = (sub.setting.get(key) for key in ("importance", "pruning_rate"))
        return family(sub.score), sub.strategy, *asked

    competing = with_several((setting(sub), sub.score) for sub in retrained)
    ambiguous = {score for score, *_ in competing}

    def name(key: str) -> str:
        told = is_plain(key.removesuffix("_balanced")) and family(key) not in ambiguous
        return family(key) if told else key

    return {key: name(key) for key in [*keys, *(sub.score for sub in retrained)]}


def _read_retrained(run: RunDir, model: str, problems: list[str]) -> Retrained:
    config, result = run.read_config(), _read_record(run.read_result, run.result_file, problems)
    env = _read_env(run, problems)  # says at the start what the result repeats at the end
    setting = {
        "seed": config.get("run", {}).get("seed"),
        "epochs": config.get("train", {}).get("epochs"),
    }
    setting |= {key: env[key] for key in _SETTING_KEYS if key in env}
    setting |= result or {}
    has_other = setting.get("model", model) != model
    other = setting.get("variant") or setting.get("model") if has_other else None
    setting["network"] = setting.get("network") or other
    return Retrained(run.path.name, setting, result, _read_metrics(run), env, config)


def _own_dataset(
    scores: Mapping[str, Scores], num_images: int | None, manifest: Any
) -> Fingerprint | None:
    """Return the data set that most of the scores are of; of equally many that of the run, then of
    its manifest; None without scores."""
    found = [*dict.fromkeys(each.fingerprint for each in scores.values())]
    found = [each for each in found if each.labels_sha256] or found

    def weight(own: Fingerprint) -> tuple[int, bool, bool]:
        same = [_other_dataset(each.fingerprint, own, "") is None for each in scores.values()]
        of_manifest = manifest is not None and _other_dataset(manifest.fingerprint, own, "") is None
        return sum(same), own.num_samples == num_images, of_manifest

    return max(found, key=weight, default=None)


def _other_dataset(have: Fingerprint, own: Fingerprint, what: str | Path) -> str | None:
    """Return what `require_same_dataset` says, or None."""
    try:
        require_same_dataset(have, own, str(what))
    except InputError as error:
        return str(error)
    return None


def _read_record(read: Callable[[], Any], path: Path, problems: list[str]) -> dict[str, Any] | None:
    """Read a JSON object; None, with a problem, where the file holds something else."""
    try:
        record = read()
        if record is None or isinstance(record, dict):
            return record
        problem = f"{type(record).__name__} instead of an object"
    except (ValueError, OSError) as error:
        problem = str(error)
    problems.append(
        f"{path} is damaged ({problem}) and left out; restore it, or run the stage again"
    )
    return None


def _read_env(run: RunDir, problems: list[str]) -> dict[str, Any]:
    env = _read_record(run.read_env, run.env_file, problems) or {}
    kinds = {"versions": dict, "data": dict, "resumes": list, "command": list, "started": str}
    return {key: value for key, value in env.items() if isinstance(value, kinds.get(key, object))}


def _read_metrics(run: RunDir) -> list[dict[str, Any]]:
    """Read one record per epoch. A line that a kill cut short is left out; of a repeated epoch the
    last record counts."""
    by_epoch: dict[int, dict[str, Any]] = {}
    for record in read_objects(run.metrics_file):
        if isinstance(record.get("epoch"), int):
            by_epoch[record["epoch"]] = record
    return [by_epoch[epoch] for epoch in sorted(by_epoch)]


def _read_manifest(beton: str | None, problems: list[str]) -> Any:
    if not beton or not Path(beton).is_file():
        return None
    try:
        from tdds_dist.data.manifest import read_manifest

        return read_manifest(Path(beton))
    except (InputError, OSError, ImportError) as error:
        problems.append(str(error))
        return None


# ---- groups


def grouped(items: Iterable[_T], key: Callable[[_T], _K]) -> dict[_K, list[_T]]:
    """Group items by a key; groups and their members in the order of the items."""
    found: dict[_K, list[_T]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def with_several(pairs: Iterable[tuple[_K, Hashable]]) -> set[_K]:
    """Return the keys that come with more than one value."""
    num_values = Counter(key for key, _ in {*pairs})
    return {key for key, num in num_values.items() if num > 1}
