"""Stage `score`: compute scores again from what was recorded, without touching an image.

Reads our trajectory, or a dynamics folder of the authors' code (`{epoch}_Output.npy` logits and `{epoch}_Index.npy` in
visit order). The latter is streamed: two epochs of log-probabilities are in memory, not all of them.
"""

# T epochs, N dataset, C classes

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from tdds_dist.artifacts import UNKNOWN_LABEL, Fingerprint, Scores, fingerprint, save_scores
from tdds_dist.beton import check_labels, dataset_fingerprint, inspect_beton, read_manifest
from tdds_dist.config import parse_config
from tdds_dist.errors import InputError
from tdds_dist.rundir import RunDir
from tdds_dist.scalars import log_probabilities, loss_difference_official, loss_difference_paper
from tdds_dist.tdds import DELTA_OF_PRESET, Window, check_window, score_trajectory, window_settings
from tdds_dist.trajectory import Trajectory

_OUTPUT = re.compile(r"(\d+)_Output\.npy")


def score(source: Path, *, preset: str | None = None, T: int | None = None, K: int | None = None, beta: float | None = None,
          beton: Path | None = None, out: Path | None = None) -> list[Path]:
    """Run the stage; returns the score files.

    `source` is a run directory, a trajectory directory, or a dynamics folder. T, K, beta and preset default to the
    run's config; without a config T defaults to all epochs, K to 10, beta to 0.9, preset to `official`. A run without T
    and K gives every window of its config. `beton` supplies labels where the source has none.

    Raises:
        InputError: nothing recorded there, epochs missing, settings that do not fit.
    """
    source = Path(source)
    if not source.is_dir():
        raise InputError(f"{source} is not a directory; give a run directory, a trajectory, or a folder of *_Output.npy")
    if any(_OUTPUT.fullmatch(path.name) for path in source.iterdir()):
        window = Window(*_settings(T, K, beta, _num_dynamics(source)))
        return _score_dynamics(source, window, preset or "official", beton, out)
    is_run = (source / "config.yaml").is_file()
    trajectory = Trajectory(source / "trajectory" if is_run else source)
    windows: list[Window] | None = None
    origin: dict[str, object] = {}
    if is_run:
        config = parse_config(RunDir(source).read_config(), str(source / "config.yaml"))
        preset = preset or config.score.preset
        if T is None and K is None:
            windows = [window if beta is None else replace(window, beta=beta) for window in config.windows()]
        beta = config.score.beta if beta is None else beta
        origin = {"seed": config.run.seed, "world_size": RunDir(source).read_env().get("world_size")}
    windows = windows or [Window(*_settings(T, K, beta, trajectory.num_epochs))]
    preset = preset or "official"
    for window in windows:
        check_window(window, preset, trajectory.num_epochs)
    if out is not None and len(windows) > 1:
        raise InputError(f"--out={out} names one file, the run has {len(windows)} windows; choose one with --T and --K")
    label_N, found = _labels(trajectory.labels(), trajectory.num_classes, beton)
    delta_TN = trajectory.read(DELTA_OF_PRESET[preset], max(window.T for window in windows))
    folder = RunDir(source).scores if is_run else source
    origin["epochs"] = trajectory.num_epochs
    return [_save(score_trajectory(delta_TN, window, preset), window, preset, label_N, found, folder, out, origin)
            for window in windows]


def _settings(T: int | None, K: int | None, beta: float | None, num_epochs: int) -> tuple[int, int, float]:
    return (num_epochs if T is None else T, 10 if K is None else K, 0.9 if beta is None else beta)


def _score_dynamics(folder: Path, window: Window, preset: str, beton: Path | None, out: Path | None) -> list[Path]:
    check_window(window, preset, _num_dynamics(folder))
    difference = loss_difference_official if preset == "official" else loss_difference_paper
    delta = []
    previous_NC: torch.Tensor | None = None
    for epoch in range(window.T):
        logp_NC = log_probabilities(_read_dynamics(folder, epoch))
        if previous_NC is not None and previous_NC.shape != logp_NC.shape:
            raise InputError(f"{folder}: epoch {epoch} has outputs {tuple(logp_NC.shape)}, the one before "
                             f"{tuple(previous_NC.shape)}; the folder mixes runs")
        delta.append(torch.full((len(logp_NC),), torch.nan) if previous_NC is None else difference(previous_NC, logp_NC))
        previous_NC = logp_NC
    assert previous_NC is not None
    num_samples, num_classes = previous_NC.shape
    label_N, found = _labels(np.full(num_samples, UNKNOWN_LABEL), num_classes, beton)
    score_N = score_trajectory(torch.stack(delta).numpy(), window, preset)
    return [_save(score_N, window, preset, label_N, found, folder, out)]


def _num_dynamics(folder: Path) -> int:
    epochs = {int(match[1]) for path in folder.iterdir() if (match := _OUTPUT.fullmatch(path.name))}
    if missing := sorted(set(range(max(epochs))) - epochs):
        raise InputError(f"{folder} holds no {missing[0]}_Output.npy but later epochs; restore it or remove the later ones")
    return len(epochs)


def _read_dynamics(folder: Path, epoch: int) -> torch.Tensor:
    """Logits of an epoch by global index, float32 [N, C]."""
    arrays = []
    for name in ("Output", "Index"):
        path = folder / f"{epoch}_{name}.npy"
        try:
            arrays.append(np.load(path, allow_pickle=False))
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{path} cannot be read ({error}); T epochs need 0_{name}.npy to (T-1)_{name}.npy") from error
    output_NC, index_N = arrays[0], arrays[1].astype(np.int64).reshape(-1)
    if output_NC.ndim != 2 or not np.issubdtype(output_NC.dtype, np.floating):
        raise InputError(f"{folder / f'{epoch}_Output.npy'} is {output_NC.dtype} {output_NC.shape}, expected floating-point "
                         "logits [N, C]")
    if not np.array_equal(np.sort(index_N), np.arange(len(output_NC))):
        raise InputError(f"{folder / f'{epoch}_Index.npy'} does not hold every index 0..{len(output_NC) - 1} once; "
                         "an epoch must record every sample exactly once")
    if not np.isfinite(output_NC).all():
        bad = index_N[~np.isfinite(output_NC).all(axis=1)][:8].tolist()
        raise InputError(f"{folder / f'{epoch}_Output.npy'} holds NaN or infinite logits (global indices {bad})")
    by_index_NC = np.empty(output_NC.shape, dtype=np.float32)
    by_index_NC[index_N] = output_NC
    return torch.from_numpy(by_index_NC)


def _labels(label_N: np.ndarray, num_classes: int, beton: Path | None) -> tuple[np.ndarray, Fingerprint]:
    if beton is None:
        return label_N, fingerprint(label_N, num_classes)
    info = inspect_beton(Path(beton))
    if info.num_samples != len(label_N):
        raise InputError(f"--beton={beton} holds {info.num_samples} samples, the recorded outputs {len(label_N)}; "
                         "give the file that was trained on")
    check_labels(info, num_classes, read_manifest(Path(beton)))
    if ((label_N != UNKNOWN_LABEL) & (label_N != info.label_N)).any():
        raise InputError(f"--beton={beton} has other labels than those recorded; give the file that was trained on")
    return info.label_N, dataset_fingerprint(info, num_classes)


def _save(score_N: np.ndarray, window: Window, preset: str, label_N: np.ndarray, found: Fingerprint, folder: Path,
          out: Path | None, origin: dict[str, object] | None = None) -> Path:
    key = window.key(preset)
    path = Path(out) if out is not None else folder / f"{key}.npz"
    settings = window_settings(window, preset) | {"source": "recorded"} | (origin or {})
    save_scores(path, Scores(key, score_N, label_N, found, settings))
    return path
