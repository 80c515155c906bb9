"""The run directory: where every file of a run lies, and the small JSON records in it.

Owns paths and records (`env.json`, `metrics.jsonl`, `result.json`, `config.yaml`, TensorBoard); not
the formats of scores, coresets (`artifacts`) or trajectories (`trajectory`). Only rank 0 writes
through it.
"""

import filecmp
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import numpy as np
import yaml

from tdds_dist.console import log
from tdds_dist.errors import InputError
from tdds_dist.runs.artifacts import (
    Scores,
    load_scores,
    save_scores,
    sync,
    sync_folder,
    write_atomically,
)

_STEP = re.compile(r"step_(\d{10,})")


class RunDir:
    """Paths of one run; `retrain/<name>` inside it are run directories of their own."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.result_file = self.path / "result.json"
        self.config_file = self.path / "config.yaml"
        self.env_file = self.path / "env.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.val_classes_file = self.path / "val_classes.npz"
        self.log_file = self.path / "log.txt"
        self.status_file = self.path / "status.json"
        self.tensorboard = self.path / "tb"
        self.trackers_file = self.path / "trackers.json"
        self.checkpoints = self.path / "checkpoints"
        self.trajectory = self.path / "trajectory"
        self.pruning = self.path / "pruning"
        self.scores = self.path / "scores"
        self.coresets = self.path / "coresets"
        self.models = self.path / "models"
        self.retrain = self.path / "retrain"
        self.report_file = self.path / "report.html"
        self.suspects = self.path / "suspects"

    def start(
        self, config: dict[str, Any], stage: dict[str, Any], world_size: int, device: str
    ) -> None:
        """Create the directory, with the config and the record of how the run was started; `stage`
        names the stage and its settings."""
        self.write_start(config, stage | environment(world_size, device))

    def write_start(self, config: dict[str, Any], env: dict[str, Any]) -> None:
        """Write config and record; env.json comes last, so a config alone is a start that did not
        happen."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(
                self.config_file,
                lambda file: file.write(yaml.safe_dump(config, sort_keys=False).encode()),
            )
            self.write_env(env)
        except OSError as error:
            raise InputError(
                f"cannot write to run.dir={self.path} ({error}); choose a writable directory"
            ) from error

    def write_env(self, env: dict[str, Any]) -> None:
        """Write the record of how the run was started."""
        self._write_json(self.env_file, env)

    def retrain_run(self, name: str) -> "RunDir":
        """Return the directory of a retraining; raise InputError when the name leads elsewhere."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+=,@-]*", name):
            raise InputError(
                f"--name={name!r} must be letters, digits and ._+=,@- only, and start with a letter"
                " or digit"
            )
        return RunDir(self.retrain / name)

    def set_aside(self) -> Path:
        """Move what a run of this directory wrote into a folder in it; coresets and retrainings
        stay. Return the folder."""
        stay = (self.path, self.coresets, self.retrain)
        return move_aside(*(path for path in vars(self).values() if path not in stay))

    def rewind(self, num_epochs: int) -> None:
        """Remove the metrics of later epochs, which will be recorded again."""
        if self.metrics_file.is_file():
            lines = [
                json.dumps(record) + "\n"
                for record in self.read_metrics()
                if record["epoch"] < num_epochs
            ]
            write_atomically(self.metrics_file, lambda file: file.write("".join(lines).encode()))
        if (classes := self.read_val_classes()) is not None:
            self._write_val_classes(classes.before(num_epochs))

    def read_config(self) -> dict[str, Any]:
        """Return the resolved config as it was run."""
        if not self.config_file.is_file():
            way_out = "`tdds collect` makes one"
            if not self.path.exists():
                raise InputError(f"{self.path} does not exist; {way_out}")
            if seeds := sorted(self.path.glob("seed*/config.yaml")):
                way_out = f"it is an experiment, give one of its runs, e.g. {seeds[0].parent}"
            elif scores := sorted(self.path.glob("*.npz")):
                way_out = f"it is a folder of scores, give one of them, e.g. {scores[0]}"
            raise InputError(f"{self.path} is not a run directory (no config.yaml); {way_out}")
        return yaml.safe_load(self.config_file.read_text())

    def read_env(self) -> dict[str, Any]:
        """Return the record of how the run was started; empty when there is none."""
        return json.loads(self.env_file.read_text()) if self.env_file.is_file() else {}

    def train_file(self) -> Path:
        """Return the training .beton that the config names; where there is none of that name here,
        from the folder in which the run was started."""
        path = Path(str((self.read_config().get("data") or {}).get("train", "")))
        there = Path(str(self.read_env().get("folder", ""))) / path
        return there if there.is_file() and not path.is_file() else path

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Append one epoch's record to metrics.jsonl."""
        with self.metrics_file.open("a") as file:
            file.write(json.dumps(record) + "\n")
            sync(file)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return one record per epoch, in order; empty when there is none yet. A last line that was
        cut off is left out."""
        if not self.metrics_file.is_file():
            return []
        records = []
        lines = self.metrics_file.read_text().splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                records.append(json.loads(line))
            except ValueError as error:
                if number < len(lines):
                    raise InputError(
                        f"{self.metrics_file}, line {number}: not JSON ({error}); restore the file,"
                        " or remove that line"
                    ) from error
        return records

    def append_val_classes(self, epoch: int, loss_C: np.ndarray, recall_C: np.ndarray) -> None:
        """Add an epoch's mean validation loss and recall of each class, NaN of those without
        images."""
        loss_1C, recall_1C = (row_C[None].astype(np.float32) for row_C in (loss_C, recall_C))
        row = ValClasses(np.array([epoch]), loss_1C, recall_1C)
        before = self.read_val_classes()
        self._write_val_classes(row if before is None else before.before(epoch).then(row))

    def read_val_classes(self) -> "ValClasses | None":
        """Return mean validation loss and recall of each class at every validation; None where none
        is recorded."""
        path = self.val_classes_file
        if not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as arrays:
                found = ValClasses(arrays["epoch"], arrays["loss"], arrays["recall"])
            loss_EC, rises = found.loss_EC, np.diff(found.epoch_E, prepend=-1) > 0
            is_ascending = rises.ndim == 1 and rises.size > 0 and rises.all()
            if found.epoch_E.dtype.kind != "i" or not is_ascending:
                raise ValueError("epoch must be whole numbers that rise, from 0")
            if loss_EC.ndim != 2 or len(loss_EC) != len(rises):
                raise ValueError("loss must have a row per epoch and a column per class")
            if loss_EC.shape != found.recall_EC.shape:
                raise ValueError("loss and recall must be of the same epochs and classes")
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(
                f"{path} is damaged ({error}); restore it, or remove it and do without scores and"
                " samplers that need it"
            ) from error
        return found

    def _write_val_classes(self, classes: "ValClasses") -> None:
        if not len(classes.epoch_E):
            self.val_classes_file.unlink(missing_ok=True)
            return
        write_atomically(
            self.val_classes_file,
            lambda file: np.savez(
                file, epoch=classes.epoch_E, loss=classes.loss_EC, recall=classes.recall_EC
            ),
        )

    def write_result(self, record: dict[str, Any]) -> None:
        """Write the outcome; its presence says that the run finished."""
        self._write_json(self.result_file, record)

    def read_result(self) -> dict[str, Any] | None:
        """Return the outcome, or None while the run has not finished."""
        return json.loads(self.result_file.read_text()) if self.result_file.is_file() else None

    def retrain_runs(self) -> list["RunDir"]:
        """List the finished and unfinished retraining runs inside this one, by name."""
        return [RunDir(path.parent) for path in sorted(self.retrain.glob("*/config.yaml"))]

    def _write_json(self, path: Path, record: dict[str, Any]) -> None:
        write_atomically(
            path, lambda file: file.write((json.dumps(record, indent=2) + "\n").encode())
        )


@dataclass(frozen=True, eq=False)
class ValClasses:
    """Validation by class: E epochs with one, counted from 0, and C classes."""

    epoch_E: np.ndarray  # int64, ascending
    loss_EC: np.ndarray  # float32, mean over the images of a class; NaN without any
    recall_EC: np.ndarray  # float32, share of them that is right

    def before(self, epoch: int) -> "ValClasses":
        """Return the validations before an epoch."""
        kept = self.epoch_E < epoch
        return ValClasses(self.epoch_E[kept], self.loss_EC[kept], self.recall_EC[kept])

    def then(self, later: "ValClasses") -> "ValClasses":
        """Return these validations followed by later ones."""
        return ValClasses(
            np.concatenate([self.epoch_E, later.epoch_E]),
            np.concatenate([self.loss_EC, later.loss_EC]),
            np.concatenate([self.recall_EC, later.recall_EC]),
        )


def copy_run(source: RunDir, target: RunDir, config: dict[str, Any]) -> None:
    """Copy a finished collection, without coresets and retrainings, to where nothing is; `config`
    is the same with the name and place of the copy.

    Arrays and weights, which are replaced and never changed, are links to the same content where
    the file system has such.
    """
    part = target.path.with_name(f".{target.path.name}.part")
    own = (source.coresets, source.retrain, source.checkpoints, source.report_file)
    inside = (*own, source.suspects)
    left_out = shutil.ignore_patterns(*(path.name for path in inside), "before-*", "run.lock*")

    def copy(file: str, to: str) -> None:
        is_replaced = Path(file).suffix in (".npy", ".npz", ".pt")
        (link_or_copy if is_replaced else shutil.copy2)(file, to)

    try:
        if part.exists():  # of a copy that was stopped
            shutil.rmtree(part)
        shutil.copytree(source.path, part, ignore=left_out, copy_function=copy)
        RunDir(part).write_start(config, source.read_env() | {"copy_of": str(source.path)})
        part.rename(target.path)
    except OSError as error:
        raise InputError(
            f"cannot copy {source.path} to {target.path} ({error}); make room, or leave collections"
            " out"
        ) from error


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Give a file a second name, or copy it where the file system has no such; later writes replace
    the first one and leave this one alone."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; empty when it is missing, cut off or something else."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def read_objects(path: Path) -> list[dict[str, Any]]:
    """Return the JSON objects of a file, one per line, without what is damaged."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        with suppress(ValueError, RecursionError):
            found.append(json.loads(line))
    return [content for content in found if isinstance(content, dict)]


def complete_steps(directory: Path) -> dict[int, Path]:
    """Return the checkpoints in a folder by step, in order; a folder has such a name only once all
    of it is written."""
    try:
        return dict(
            sorted(
                (int(match[1]), path)
                for path in directory.iterdir()
                if (match := _STEP.fullmatch(path.name))
            )
        )
    except OSError:  # none yet
        return {}


def coreset_name(method: str, pruning_rate: float) -> str:
    """Return the name of a coreset's file."""
    return f"{method}_p{pruning_rate:g}.npz"


def retrain_name(
    coreset_file: Path, strategy: str, importance: str, seed: int, network: str = ""
) -> str:
    """Return the name of a retraining's folder; `network` where it is not that of the
    collection."""
    return "_".join(
        [coreset_file.stem, strategy, importance, *filter(None, [network]), f"seed{seed}"]
    )


def move_aside(*paths: Path) -> Path:
    """Move files and folders of one folder into a new one beside them, `before-<time>`, and return
    that.

    One level further down, no pattern for runs, scores or coresets finds them any more. Paths that
    do not exist are left out.
    """
    paths = tuple(path for path in paths if path.exists())
    folder = first = paths[0].parent / time.strftime("before-%Y%m%dT%H%M%S")
    number = 1
    while any((folder / path.name).exists() for path in paths):
        number += 1
        folder = first.with_name(f"{first.name}-{number}")
    try:
        folder.mkdir(exist_ok=True)
        for path in paths:
            path.rename(folder / path.name)
    except OSError as error:
        raise InputError(
            f"cannot move {paths[0]} aside to {folder} ({error}); move it by hand"
        ) from error
    sync_folder(folder.parent)
    return folder


def write_keeping(path: Path, write: Callable[[IO[bytes]], object]) -> list[str]:
    """Write a file; another one that has the name is moved aside. Return what to say of that."""
    new = path.with_name(f".new.{path.name}")
    try:
        write_atomically(new, write)
        said = []
        if path.exists() and not filecmp.cmp(new, path, shallow=False):
            said = [f"{path} held something else, which is moved aside to {move_aside(path)}"]
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
    return said


def put_scores(path: Path, scores: Scores) -> None:
    """Save a score file. What is there under its name, if it is imported, of other settings or
    data, or no score file, is moved aside with a warning."""
    if path.exists():
        try:
            there = load_scores(path)
            was, now = there.settings, json.loads(json.dumps(scores.settings))
            free = ("source", "world_size")  # where and on how many ranks makes no other scores
            changed = [
                f"{key} was {was[key]!r}, now {now[key]!r}"
                for key in was.keys() & now.keys() - {*free}
                if was[key] != now[key]
            ]
            changed += ["imported"] * (was.get("source") == "imported" != now.get("source"))
            changed += ["of other images"] * (there.fingerprint != scores.fingerprint)
            found = f"holds other scores ({'; '.join(sorted(changed))})" if changed else ""
        except InputError:
            found = "is no readable score file"
        if found:
            log.warning(f"{path} {found}; it is moved aside to {move_aside(path)}")
    save_scores(path, scores)


def environment(world_size: int, device: str) -> dict[str, Any]:
    """Return the provenance of a run: versions, commit, hardware, command."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [Path(sys.argv[0]).name.replace("__main__.py", "tdds"), *sys.argv[1:]],
        "folder": _folder(),
        "commit": _commit(),
        "world_size": world_size,
        "device": device,
        "cpu": _cpu_name(),
        "num_cpus": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {
            name: _version(name)
            for name in ("tdds-dist", "torch", "torchvision", "ffcv", "numba", "numpy")
        },
    }


def _folder() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:  # somebody has removed it
        return ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    source = Path(__file__).resolve().parent
    try:
        git = subprocess.run(
            ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return git.stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )


def any_scores(source: Path) -> Scores:
    """Load any score file, for the labels and fingerprint of the dataset, and the quarantined
    samples: imported ones, which know none, only where there are no others."""
    if source.is_file():
        return load_scores(source)
    found = sorted(RunDir(source).scores.glob("*.npz"))
    if not found:
        raise InputError(f"{source} holds no scores; run `tdds collect` or `tdds score` first")
    for path in found:
        if (scores := load_scores(path)).settings.get("source") != "imported":
            return scores
    return load_scores(found[0])
