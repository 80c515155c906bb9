"""One pass over the training images with the final model, in evaluation view: the scores that
recorded epochs cannot give.

Entropy needs nothing but its own row. Moderate needs the median of every feature over a class, so
each class is kept by one rank: a batch's features travel to the owners of their classes, leave the
device at once, and wait in host memory (ImageNet-1K with 512 features: 2.6 GB divided by the
ranks). No rank ever sees all of them.
"""

# B rows per rank and step, C classes, D features, M rows whose classes this rank keeps, N dataset,
# W world size

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdds_dist.config.run import Config, parse_config
from tdds_dist.console import Progress, log
from tdds_dist.data.beton import BetonInfo
from tdds_dist.data.loader import BetonLoader, default_workers, torch_threads
from tdds_dist.distributed import collectives
from tdds_dist.distributed.collectives import together
from tdds_dist.distributed.partition import class_owners, epoch_order, routing_counts
from tdds_dist.distributed.world import World
from tdds_dist.errors import InputError
from tdds_dist.runs.artifacts import Fingerprint, Scores, require_same_dataset
from tdds_dist.runs.directory import RunDir, any_scores, put_scores
from tdds_dist.scoring import baselines, quarantine
from tdds_dist.scoring.sample_stats import log_probabilities
from tdds_dist.training.build import (
    InputStage,
    autocast,
    build_model,
    build_views,
    classifier_layer,
    on_this_node,
    open_files,
)


def final_pass(directory: Path, world: World) -> list[Path]:
    """Score a finished run by its final weights (`models/final.pt`); return the score files. Every
    rank calls it.

    Writes `entropy` (of the output, highest kept) and `moderate` (distance of the penultimate
    features from the median of their class; the centre of the ranking is kept).

    Raises:
        InputError: not a run, weights missing, or data that does not fit; on every rank.
    """
    run = RunDir(directory)
    with together(world):
        config = parse_config(run.read_config(), str(run.config_file))
        train_file, _, found = open_files(config)
        if any(run.scores.glob("*.npz")):
            require_same_dataset(
                found, any_scores(run.path).fingerprint, f"data.train={train_file.path}"
            )
        result = {"epochs": len(run.read_metrics())} | (run.read_result() or {})
    (train_file,) = on_this_node(config, [train_file], world)
    return score_weights(config, world, run, train_file, found, result)


def score_weights(
    config: Config,
    world: World,
    run: RunDir,
    train_file: BetonInfo,
    found: Fingerprint,
    result: dict[str, Any],
) -> list[Path]:
    """Compute and save the scores by final weights of a run with this result (`epochs`, and who is
    in quarantine)."""
    values, guess = run_model(config, world, train_file, run)
    settings = {
        "source": "final_pass",
        "view": "evaluation",
        "epochs": result["epochs"],
        "seed": config.run.seed,
        "world_size": world.world_size,
    }
    return write_scores(
        run, world, values, train_file, found, settings, quarantine.noted_in(result), guess
    )


def write_scores(
    run: RunDir,
    world: World,
    values: dict[str, np.ndarray],
    train_file: BetonInfo,
    found: Fingerprint,
    settings: dict[str, Any],
    quarantined: Collection[int] = (),
    guess: dict[str, np.ndarray] | None = None,
) -> list[Path]:
    """Save what `run_model` gave, on the main rank, `guess` beside entropy; return the paths on
    every rank.

    `quarantined` samples may have values that are not finite; they get the lowest of the others.
    """
    settings = settings | quarantine.noted(quarantined)
    paths = [run.scores / f"{key}.npz" for key in values]
    with together(world):
        for key, score_N in values.items():
            rest_n = quarantine.not_quarantined(len(score_N), quarantined)
            bad = rest_n[~np.isfinite(score_N[rest_n])]
            if len(bad):
                raise InputError(
                    f"{key} is not finite for {len(bad)} samples (global indices"
                    f" {bad[:8].tolist()}); the final weights are damaged or training diverged"
                )
        if world.is_main:
            for path, (key, score_N) in zip(paths, values.items(), strict=True):
                score_N = quarantine.set_lowest(score_N, quarantined)
                beside = guess or {} if key == "entropy" else {}
                setting = {"score": key} | settings
                put_scores(path, Scores(key, score_N, train_file.label_N, found, setting, beside))
    return paths


def _read_weights(run: RunDir) -> dict[str, Tensor]:
    path = run.models / "final.pt"
    if not path.is_file():
        raise InputError(
            f"{path} does not exist; the final pass needs the weights that `tdds collect` leaves at"
            " its end"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch says it in many ways, and at length
        raise InputError(
            f"{path} cannot be read ({_start_of(error)}); restore it or collect again"
        ) from error


def _start_of(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


@torch.no_grad()
def run_model(
    config: Config, world: World, train_file: BetonInfo, run: RunDir
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Compute scores by the weights that `run` ended with: key -> float32 [N], on every rank; and
    what the network takes each image for: `p_label`, `other`, the likeliest class but the label,
    and `p_other`, float32 [N] each. A collective.

    `moderate` is missing where the network has no linear classifier. InputError, on every rank,
    when the weights are missing or do not fit.
    """
    if world.device.type == "cpu":
        torch.set_num_threads(torch_threads(world.ranks_per_cpu))
    torch.set_float32_matmul_precision(config.train.matmul_precision)
    num_classes, model_config = config.data.num_classes, config.model
    model = build_model(
        model_config.name,
        num_classes,
        cifar_stem=model_config.cifar_stem,
        channels_last=model_config.channels_last,
    )
    with together(world):
        try:
            model.load_state_dict(_read_weights(run))
        except (RuntimeError, TypeError) as error:
            raise InputError(
                f"{run.models / 'final.pt'} does not fit model.name={model_config.name}"
                f" ({_start_of(error)}); restore the weights of this run or collect again"
            ) from error
    model = model.to(world.device).eval()
    input_stage = InputStage(config.data.mean, config.data.std, model_config.channels_last).to(
        world.device
    )
    # any batch will do
    rows = max(1, config.train.global_batch_size // (world.world_size * config.train.accumulation))
    workers = config.data.num_workers or default_workers(world.ranks_per_cpu)
    loader = BetonLoader(
        train_file, rows, build_views(config)[1], device=world.device, num_workers=workers
    )
    order = epoch_order(train_file.num_samples, rows * world.world_size, shuffle=False)
    gatherer = _ByClass(train_file.label_N, world)
    ranks = world.rank, world.world_size
    # entropy, and the guess
    found_4N = torch.zeros(4, train_file.num_samples, device=world.device)
    caught: list[Tensor] = []
    layer = classifier_layer(model, num_classes)
    if layer is not None:
        layer.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    batches = loader.batches(order, rank=world.rank, world_size=world.world_size, epoch=0)
    with Progress("final pass", train_file.num_samples, "images", world.is_main) as progress:
        for step, batch in enumerate(batches):
            with autocast(config, world.device):
                logp_BC = log_probabilities(model(input_stage(batch.image)))
            entropy_B = -(logp_BC.exp() * logp_BC).sum(dim=1)
            real_B = batch.index >= 0
            logp_label_B1 = logp_BC.gather(1, batch.label[:, None])
            but_label_BC = logp_BC.scatter(1, batch.label[:, None], -torch.inf)
            logp_other_B, other_B = but_label_BC.max(dim=1)
            found_4B = torch.stack(
                [entropy_B, logp_label_B1[:, 0].exp(), other_B.float(), logp_other_B.exp()]
            )
            found_4N.index_add_(1, batch.index.clamp_min(0), torch.where(real_B, found_4B, 0.0))
            if layer is not None:
                counts = routing_counts(
                    order, *ranks, train_file.num_samples, gatherer.owner_N, step, step + 1
                )
                sends, receives = (count_1W[0].tolist() for count_1W in counts)
                gatherer.add(batch.index, caught.pop().float().flatten(1), sends, receives)
            progress.advance(order.num_real(step))
    entropy_N, *guess_3N = collectives.sum_over_ranks(found_4N).cpu().numpy()
    values = {"entropy": entropy_N}
    guess = dict(zip(("p_label", "other", "p_other"), guess_3N, strict=True))
    if layer is None:
        if world.is_main:
            log.warning(
                f"{model_config.name} does not end in a linear layer, so there is no score"
                " `moderate`"
            )
        return values, guess
    distance_N = torch.zeros(train_file.num_samples)
    distance_N[torch.from_numpy(gatherer.index_M)] = torch.from_numpy(gatherer.distances())
    # one rank has each, others 0
    values["moderate"] = collectives.sum_over_ranks(distance_N.to(world.device)).cpu().numpy()
    return values, guess


class _ByClass:
    """The features of the classes that this rank keeps.

    Protocol: every rank calls `add` once per step with its own rows and the counts that
    `routing_counts` gives for `owner_N`; each row arrives at the owner of its class. Padding rows
    stay and are dropped.
    """

    def __init__(self, label_N: np.ndarray, world: World):
        self.owner_N = class_owners(label_N, world.world_size)[label_N]
        self.index_M = np.flatnonzero(self.owner_N == world.rank)
        self._label_M = label_N[self.index_M]
        self._owner_on_device_N = torch.from_numpy(self.owner_N).to(world.device)
        self._rank = world.rank
        self._feature_MD: np.ndarray | None = None
        # what arrived last, on its way to the host, and the CUDA event that it is there
        self._pending: tuple[Tensor, torch.cuda.Event | None] | None = None

    def add(
        self, index_B: Tensor, feature_BD: Tensor, sends: list[int], receives: list[int]
    ) -> None:
        """Send this rank's rows to their owners, and keep what arrived in the step before: the
        device works on this one meanwhile."""
        owner_B = torch.where(
            index_B >= 0, self._owner_on_device_N[index_B.clamp_min(0)], self._rank
        )
        by_owner_B = torch.argsort(owner_B, stable=True)
        header_BX = index_B[by_owner_B, None].view(torch.uint8)
        payload_BX = torch.cat(
            [header_BX, feature_BD[by_owner_B].contiguous().view(torch.uint8)], dim=1
        )
        payload_RX = collectives.exchange_rows(payload_BX, sends, receives).wait()
        copy_RX = torch.empty(
            payload_RX.shape, dtype=payload_RX.dtype, pin_memory=payload_RX.is_cuda
        )
        copy_RX.copy_(payload_RX, non_blocking=True)
        copied = torch.cuda.current_stream().record_event() if payload_RX.is_cuda else None
        self._keep_pending()
        self._pending = copy_RX, copied

    def _keep_pending(self) -> None:
        """Put the rows of the step before into their places, when they have left the device."""
        if self._pending is None:
            return
        payload_RX, copied = self._pending
        self._pending = None
        if copied is not None:
            copied.synchronize()
        index_R = payload_RX[:, :8].reshape(-1).view(torch.int64).numpy()
        num_features = (payload_RX.shape[1] - 8) // 4
        feature_X = payload_RX[:, 8:].reshape(-1).view(torch.float32)
        feature_RD = feature_X.view(len(index_R), num_features).numpy()  # R may be 0
        if self._feature_MD is None:
            self._feature_MD = np.zeros((len(self.index_M), num_features), dtype=np.float32)
        real_R = index_R >= 0
        self._feature_MD[np.searchsorted(self.index_M, index_R[real_R])] = feature_RD[real_R]

    def distances(self) -> np.ndarray:
        """Compute Moderate's distance of every kept row, float32 [M]."""
        self._keep_pending()
        assert self._feature_MD is not None
        return baselines.moderate(self._feature_MD, self._label_M)
