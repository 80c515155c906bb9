"""The source of an export: a run directory, a score file or a coreset, and the dataset that it
belongs to."""

# N dataset

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tdds_dist.config.run import parse_config
from tdds_dist.config.scores import DEFAULT_RATES
from tdds_dist.data.manifest import Dataset, manifest_path, not_utf8, read_dataset
from tdds_dist.errors import InputError
from tdds_dist.runs.artifacts import (
    Coreset,
    Fingerprint,
    Scores,
    load_coreset,
    load_scores,
    require_same_dataset,
)
from tdds_dist.runs.directory import RunDir


@dataclass(frozen=True)
class Source:
    """The source of an export: scores by name of their column, or a coreset; and the run it belongs
    to."""

    path: Path
    scores: dict[str, Scores]
    coreset: Coreset | None
    run: RunDir | None


def read_source(source: Path) -> Source:
    """Read a run directory with scores, a score file or a coreset; raise InputError for scores that
    are not finite."""
    run: RunDir | None
    if not source.exists():
        raise InputError(
            f"{source} does not exist; give a run directory, a score file or a coreset"
        )
    if source.is_dir():
        run = RunDir(source)
        run.read_config()  # else not a run
        files = sorted(run.scores.glob("*.npz"))
        if not files:
            raise InputError(f"{source} holds no scores; run `tdds collect` or `tdds score` first")
        # by the name that `tdds select --score` takes
        scores = {file.stem: load_scores(file) for file in files}
        first = scores[files[0].stem].fingerprint
        for file in files[1:]:
            require_same_dataset(scores[file.stem].fingerprint, first, str(file))
    else:
        folder = (
            source.parent.parent if source.parent.name in ("scores", "coresets") else source.parent
        )
        run = RunDir(folder) if (folder / "config.yaml").is_file() else None
        if _is_coreset(source):
            return Source(source, {}, load_coreset(source), run)
        found = load_scores(source)
        scores = {found.key: found}
    for name, found in scores.items():
        if num_bad := int((~np.isfinite(found.score_N)).sum()):
            raise InputError(
                f"{source}: score {name!r} holds {num_bad} values that are not finite; compute it"
                " again with `tdds score`"
            )
    return Source(source, scores, None, run)


def _is_coreset(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as file:
            return "index.npy" in file.namelist()
    except (OSError, zipfile.BadZipFile):
        return False  # load_scores says what is wrong


def configured_rates(run: RunDir | None) -> tuple[float, ...]:
    """Return the pruning rates that the windows of a run serve, else DEFAULT_RATES."""
    if run is None:
        return DEFAULT_RATES
    config = parse_config(run.read_config(), str(run.config_file))
    return config.served_rates or DEFAULT_RATES


def dataset_of(given: Source, beton: Path | None, found: Fingerprint) -> tuple[Dataset | None, str]:
    """Return the dataset of an export, and why it, or its manifest, is missing."""
    if beton is None:
        if given.run is None:
            return None, f"{given.path} does not lie in a run; give --beton FILE"
        beton = given.run.train_file()
        if not beton.is_file():
            where = f"data.train={beton} of {given.run.path}"
            return None, f"{where} does not exist here; give --beton FILE"
    run = given.run
    config = None if run is None else parse_config(run.read_config(), str(run.config_file))
    dataset = read_dataset(Path(beton), found.num_classes, config)
    require_same_dataset(found, dataset.fingerprint, str(given.path))
    return dataset, f"{manifest_path(dataset.where)} does not exist; `tdds write` makes it"


def utf8_paths(path_N: list[str]) -> list[str]:
    """Return the paths; raise InputError for what no UTF-8 file can hold, which `write` refuses."""
    if names := not_utf8(path_N):
        raise InputError(
            f"names that are not UTF-8: {len(names)} (such as {names[0]}); rename the images, write"
            " the .beton again, and give it by --beton FILE"
        )
    return path_N
