"""Files that one stage hands to the next: score files, coresets, and the fingerprint that ties both
to a dataset.

Owns their format and nothing else. Both are `.npz` files that `np.load(allow_pickle=False)` reads;
what is not an array is one JSON string under `meta`. Every file is written aside, synced and
renamed, so a name that exists is a file that is whole.
"""

# N dataset, M kept samples

import errno
import hashlib
import json
import os
import secrets
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from tdds_dist.config.scores import CLASS_BALANCED, SAMPLER_OF_SCORE
from tdds_dist.errors import InputError

# label of a sample whose class was not recorded (the authors' dynamics folders hold no labels)
UNKNOWN_LABEL = -1
# what a file system answers that has no fsync (FUSE mounts of object stores, some network drives)
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM}


@dataclass(frozen=True)
class Fingerprint:
    """The identity of a dataset for scores: its size, its number of classes, the label of every
    index, and the names of the classes where they are known (they do not count for `==`)."""

    num_samples: int
    num_classes: int
    labels_sha256: str  # "" when the labels are unknown
    classes_sha256: str = field(default="", compare=False)  # "" when the names are unknown


@dataclass(frozen=True)
class Scores:
    """One score per global index; higher means keep."""

    key: str
    score_N: np.ndarray  # float32
    label_N: np.ndarray  # int64, UNKNOWN_LABEL where not recorded
    fingerprint: Fingerprint
    settings: dict[str, Any] = field(default_factory=dict)
    # float32 [N] each: what a sampler needs beside the score
    extra: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Coreset:
    """The kept samples: sorted global indices and the importance of each in retraining."""

    index_M: np.ndarray  # int64, strictly increasing
    importance_M: np.ndarray  # float32
    score_key: str
    pruning_rate: float
    fingerprint: Fingerprint
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """Return score and way of choosing as one name, e.g. `el2n`, `ccs_aum`,
        `tdds_official_T30_K10_beta0.9_balanced`."""
        sampler = self.settings.get("sampler", "top")
        score = self.settings.get("score", self.score_key)
        plain = SAMPLER_OF_SCORE.get(score, "top")
        name = self.score_key if sampler == plain else f"{sampler}_{self.score_key}"
        if (cutoff := self.settings.get("own_hard_cutoff_rate")) is not None:
            name += f"_cut{cutoff:g}"
        if (strata := self.settings.get("num_strata", 50)) != 50:
            name += f"_strata{strata}"
        if (c_d := self.settings.get("c_d", 4.0)) != 4.0:
            name += f"_cd{c_d:g}"
        balanced = bool(self.settings.get("class_balanced"))
        if sampler != "drop" and balanced != (score in CLASS_BALANCED):
            name += "_balanced" if balanced else "_unbalanced"
        return name


def fingerprint(
    label_N: np.ndarray, num_classes: int, class_names: Sequence[str] = ()
) -> Fingerprint:
    """Compute the fingerprint of a dataset from its labels by global index (int64 [N]) and, where
    they are known, the names of its classes by label."""
    label_N = np.ascontiguousarray(label_N, dtype="<i8")
    unknown = bool((label_N == UNKNOWN_LABEL).any())
    digest = "" if unknown else hashlib.sha256(label_N.tobytes()).hexdigest()
    names = hashlib.sha256(json.dumps(list(class_names)).encode()).hexdigest()
    return Fingerprint(len(label_N), int(num_classes), digest, names if class_names else "")


def require_same_dataset(have: Fingerprint, need: Fingerprint, what: str) -> None:
    """Raise InputError unless `have` (of the file called `what`) describes the dataset `need`.

    An unknown label hash on either side is compared by size alone; class names count where both
    sides know them.
    """
    differs = [
        f"{name} {a!r} instead of {b!r}"
        for name, a, b in (
            ("num_samples", have.num_samples, need.num_samples),
            ("num_classes", have.num_classes, need.num_classes),
            ("labels_sha256", have.labels_sha256[:12], need.labels_sha256[:12]),
        )
        if a != b and not (name != "num_samples" and "" in (have.labels_sha256, need.labels_sha256))
    ]
    names = (have.classes_sha256, need.classes_sha256)
    if not differs and "" not in names and names[0] != names[1]:
        differs = ["other class names"]
    if differs:
        raise InputError(
            f"{what} belongs to another dataset ({'; '.join(differs)}); "
            "use the scores and coresets that were made from this .beton"
        )


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Run `write` on a new file in the same folder, sync it, and rename it to `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = new_file_beside(path, ".tmp")
    try:
        with file:
            write(file)
            sync(file)
        os.replace(file.name, path)
    except BaseException:
        Path(file.name).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def new_file_beside(path: Path, suffix: str) -> IO[bytes]:
    """Create and open a hidden file in the folder of `path`, named after it.

    Its permissions are those of any new file: the umask and the folder's access lists decide, and
    nothing has to be changed later, which some file systems refuse.
    """
    while True:
        with suppress(FileExistsError):
            return path.with_name(f".{path.name}.{secrets.token_hex(4)}{suffix}").open("xb")


def sync(file: IO[Any]) -> None:
    """Write the content of a file to the disk. A file system that cannot sync is left to its own
    ways; a failed write is raised (OSError)."""
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last through a power cut, where the file system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save_scores(path: Path, scores: Scores) -> None:
    """Write `score` float32 [N], `label` int64 [N], `extra_<name>` float32 [N] and `meta` (JSON) to
    an .npz file."""
    arrays = {"score": scores.score_N.astype(np.float32), "label": scores.label_N.astype(np.int64)}
    for name, values_N in scores.extra.items():
        arrays[f"extra_{name}"] = values_N.astype(np.float32)
    _save(path, "scores", scores, arrays, key=scores.key, extra=sorted(scores.extra))


def load_scores(path: Path) -> Scores:
    """Read a score file; raise InputError when it is missing, damaged or something else."""
    meta, found, arrays = _load(path, "scores", ("score", "label"))
    if wrong := {
        name: array.shape for name, array in arrays.items() if array.shape != (found.num_samples,)
    }:
        raise InputError(
            f"{path}: arrays {wrong} must all be [{found.num_samples}]; the file is damaged, write"
            " it again with `tdds score`"
        )
    extra = {
        name.removeprefix("extra_"): array
        for name, array in arrays.items()
        if name.startswith("extra_")
    }
    return Scores(meta["key"], arrays["score"], arrays["label"], found, meta["settings"], extra)


def save_coreset(path: Path, coreset: Coreset) -> None:
    """Write `index` int64 [M] sorted, `importance` float32 [M] and `meta` (JSON) to an .npz
    file."""
    arrays = {
        "index": coreset.index_M.astype(np.int64),
        "importance": coreset.importance_M.astype(np.float32),
    }
    of_score = {"score_key": coreset.score_key, "pruning_rate": coreset.pruning_rate}
    _save(path, "coreset", coreset, arrays, **of_score)


def load_coreset(path: Path) -> Coreset:
    """Read a coreset; raise InputError when it is missing, damaged or something else."""
    meta, found, arrays = _load(path, "coreset", ("index", "importance"))
    index_M = arrays["index"]
    in_order = (
        index_M.dtype == np.int64
        and index_M.ndim == 1
        and len(index_M) > 0
        and bool((np.diff(index_M) > 0).all())
    )
    if (
        not in_order
        or index_M[0] < 0
        or index_M[-1] >= found.num_samples
        or arrays["importance"].shape != index_M.shape
    ):
        raise InputError(
            f"{path}: index must be int64, non-empty, strictly increasing within [0,"
            f" {found.num_samples}) and as long as importance; the file is damaged, write it again"
            " with `tdds select`"
        )
    return Coreset(
        index_M,
        arrays["importance"],
        meta["score_key"],
        meta["pruning_rate"],
        found,
        meta["settings"],
    )


_META_KEYS = {"scores": ("key", "settings"), "coreset": ("score_key", "pruning_rate", "settings")}


def _save(
    path: Path, kind: str, content: Scores | Coreset, arrays: dict[str, Any], **more: Any
) -> None:
    meta = {"kind": kind, "settings": content.settings, **more}
    meta["fingerprint"] = asdict(content.fingerprint)
    text = np.array(json.dumps(meta, sort_keys=True))
    write_atomically(Path(path), lambda file: np.savez(file, meta=text, **arrays))


def _load(
    path: Path, kind: str, names: tuple[str, ...]
) -> tuple[dict[str, Any], Fingerprint, dict[str, np.ndarray]]:
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"{path} does not exist; `tdds {'select' if kind == 'coreset' else 'score'}` writes"
            " such files"
        )
    try:
        with zipfile.ZipFile(path):  # else a plain .npy would come back as an array
            pass
        with np.load(path, allow_pickle=False) as file:
            meta = json.loads(str(file["meta"]))
            if (found := meta["kind"]) == kind:
                dataset = Fingerprint(**meta["fingerprint"])
                if missing := [key for key in _META_KEYS[kind] if key not in meta]:
                    raise KeyError(*missing)
                arrays = {
                    name: file[name]
                    for name in (*names, *(f"extra_{name}" for name in meta.get("extra", ())))
                }
    except (
        OSError,
        KeyError,
        ValueError,
        TypeError,
        EOFError,
        RuntimeError,
        zipfile.BadZipFile,
    ) as error:
        why = f"damaged: {error}" if isinstance(error, zipfile.BadZipFile) else repr(error)
        raise InputError(
            f"{path} is not a {kind} file of tdds ({why}); expected an .npz written by `tdds`"
        ) from error
    if found != kind:
        raise InputError(f"{path} holds {found!r}, expected {kind!r}")
    return meta, dataset, arrays
