"""`ShardedScorer`: the state of the score, cut over ranks by global index, updated while training runs.

Each rank owns a contiguous block of global indices. A row (index, label, logits) goes from the rank that visited the
sample to its owner in one asynchronous all-to-all per step; the owner holds the previous epoch's log-probabilities of
its samples and needs nothing else to compute the loss difference. State is N x C once, divided by the ranks, instead of
T x N x C on disk. Nothing in `record` waits for the device: checks write flags that `check` and `end_epoch` read.
"""

# B rows of a call, C classes, F scalars, M rows of this rank's shard, N dataset, R rows received, W world size

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from tdds_dist import distributed
from tdds_dist.artifacts import fingerprint
from tdds_dist.errors import CoverageError, InputError, NonFiniteLogitsError
from tdds_dist.partition import PADDING, EpochOrder, routing_counts, rows_per_shard
from tdds_dist.scalars import SCALARS, log_probabilities, sample_scalars
from tdds_dist.selection import set_lowest
from tdds_dist.tdds import (
    DELTA_OF_PRESET,
    Window,
    average_windows,
    check_window,
    differences_per_window,
    window_variability,
)
from tdds_dist.trajectory import TrajectoryWriter, require_no_trajectory, resume_trajectory

_HEADER_BYTES = 16  # global index and label of a row, int64 each
_NOT_QUARANTINED = -1
_NEVER = 2**62  # step of the first non-finite row while there is none
_NUM_NAMED = 8  # offending indices named in an error
_LARGEST_QUARANTINE = 0.01  # share of the samples; beyond it training has diverged


class ShardedScorer:
    """Computes TDDS for several windows during training, in any training loop.

    Args:
        num_samples: N, size of the dataset; global indices are 0 .. N - 1.
        num_classes: C, width of the logits.
        windows: the settings (T, K, beta) to score.
        preset: `official` (the authors' code) or `paper` (the equations); see `tdds`.
        device: where logits live and state is kept; default CUDA when available.
        logp_dtype: precision of the stored log-probabilities, float32 or float16.
        trajectory: directory to which every epoch's scalars are appended; None keeps no record.
        trajectory_dtype: precision of the scalars in that directory, float32 or float16. Only float32 gives the same
            scores again bit by bit.
        on_nan: NaN or infinite logits of a sample `stop` the run, or put the sample into `quarantine`: it is listed
            (`quarantined`), recorded as zeros from then on, and scored as the lowest of all.
        resume: the trajectory directory may hold epochs already; `load_state_dict` says which of them count, and without it
            none does.

    Protocol: all ranks of the default process group construct it and call `record` equally often per epoch (an empty
    call counts), then `end_epoch`; without a process group it works alone. When the visit order is known, `expect`
    spares the exchange of counts.

    Raises:
        InputError: settings that cannot be scored.
    """

    def __init__(
        self, num_samples: int, num_classes: int, windows: Sequence[Window], preset: str = "official",
        device: torch.device | str | None = None, *, logp_dtype: torch.dtype = torch.float32,
        trajectory: Path | str | None = None, trajectory_dtype: torch.dtype = torch.float32, on_nan: str = "stop",
        resume: bool = False,
    ):
        if num_samples < 1 or num_classes < 2:
            raise InputError(f"num_samples={num_samples} must be at least 1 and num_classes={num_classes} at least 2")
        if not windows:
            raise InputError("windows=[] scores nothing; give at least one Window(T, K, beta)")
        if logp_dtype not in (torch.float32, torch.float16):
            raise InputError(f"logp_dtype={logp_dtype} must be torch.float32 or torch.float16")
        if trajectory_dtype not in (torch.float32, torch.float16):
            raise InputError(f"trajectory_dtype={trajectory_dtype} must be torch.float32 or torch.float16")
        if on_nan not in ("stop", "quarantine"):
            raise InputError(f"on_nan={on_nan!r} must be 'stop' or 'quarantine'")
        for window in windows:
            check_window(window, preset)
        self.num_samples, self.num_classes, self.preset = num_samples, num_classes, preset
        self.windows = tuple(dict.fromkeys(windows))
        self._quarantines = on_nan == "quarantine"
        self.world = distributed.current_world(device)
        self.epoch = 0
        self.step = 0
        self._first, self._end = distributed.own_shard(num_samples, self.world)
        self._rows_per_shard = rows_per_shard(num_samples, self.world.world_size)
        self._counts: tuple[list[list[int]], list[list[int]]] | None = None
        self._pending: tuple[distributed.Exchange, torch.dtype, int] | None = None
        self._num_nonfinite = 0  # over all ranks, at the last `check`
        self._allocate(logp_dtype)
        self._trajectory = None
        self._clears_trajectory = resume
        self._trajectory_dtype = str(trajectory_dtype).removeprefix("torch.")
        self._directory = None if trajectory is None else Path(trajectory)
        if trajectory is not None:
            with distributed.together(self.world):
                if self.world.is_main and not resume:
                    require_no_trajectory(Path(trajectory))
            self._trajectory = TrajectoryWriter(
                trajectory, SCALARS, num_samples, num_classes, self._first, self._end, self.world.is_main,
                dtype=self._trajectory_dtype,
                scored={"preset": preset, "windows": [asdict(window) for window in self.windows]})

    def _allocate(self, logp_dtype: torch.dtype) -> None:
        """State of this shard. Row M of the per-sample tables takes what padding rows write."""
        device, rows = self.world.device, self._end - self._first
        num_slots = max(differences_per_window(window, self.preset) for window in self.windows)
        self._logp_MC = torch.zeros(rows + 1, self.num_classes, dtype=logp_dtype, device=device)
        self._scalars_MF = torch.zeros(rows + 1, len(SCALARS), device=device)
        self._label_M = torch.zeros(rows + 1, dtype=torch.int64, device=device)
        self._visits_M = torch.zeros(rows + 1, dtype=torch.int32, device=device)
        self._nonfinite_M = torch.zeros(rows + 1, dtype=torch.int32, device=device)
        self._quarantined_M = torch.full((rows,), _NOT_QUARANTINED, dtype=torch.int32, device=device)  # first bad epoch
        self._delta_KM = torch.zeros(num_slots, rows, device=device)  # slot of the difference into epoch t: t mod K
        self._average_AM = torch.zeros(len(self.windows), rows, device=device)
        self._bad_index = torch.zeros((), dtype=torch.int64, device=device)
        self._bad_label = torch.zeros((), dtype=torch.int64, device=device)
        self._nonfinite_step = torch.full((), _NEVER, dtype=torch.int64, device=device)

    # ---- one step

    def expect(self, order: EpochOrder, first_step: int = 0) -> None:
        """Announce the visit order of the epoch that starts now, as `partition` deals it out.

        Then `record` must be called with exactly those rows, step by step, and exchanges no counts. A resume in the middle
        of an epoch gives the order of the whole epoch, and the first step that is not recorded yet.
        """
        self.step = first_step
        sends_SW, receives_SW = routing_counts(order, self.world.rank, self.world.world_size, self.num_samples)
        self._counts = (sends_SW.tolist(), receives_SW.tolist())

    def record(self, index_B: Tensor, logits_BC: Tensor, label_B: Tensor) -> None:
        """Record one batch: any rank, any order, each sample once per epoch.

        Args:
            index_B: int64 [B] global indices; -1 marks a padding row, which is ignored.
            logits_BC: floating point [B, C].
            label_B: int64 [B] classes.

        All three may be reused once the device has done what is queued on it (on the CPU: at once).

        Raises:
            ValueError: shapes or dtypes that do not fit. Values are checked later, by `check` or `end_epoch`.
        """
        device = self.world.device
        if logits_BC.ndim != 2 or logits_BC.shape[1] != self.num_classes or not logits_BC.is_floating_point():
            raise ValueError(f"logits must be floating point [B, {self.num_classes}], got {logits_BC.dtype} "
                             f"{tuple(logits_BC.shape)}")
        if index_B.shape != label_B.shape or index_B.shape != logits_BC.shape[:1]:
            raise ValueError(f"index {tuple(index_B.shape)}, logits {tuple(logits_BC.shape)} and label "
                             f"{tuple(label_B.shape)} must agree in their first axis")
        if index_B.dtype != torch.int64 or label_B.dtype != torch.int64:
            raise ValueError(f"index and label must be int64, got {index_B.dtype} and {label_B.dtype}")
        self._apply_pending()
        index_B = index_B.to(device, non_blocking=True)
        label_B = label_B.to(device, non_blocking=True)
        logits_BC = logits_BC.detach().to(device)

        # 1 owner of each row; padding rows and indices out of range stay here
        in_range_B = (index_B >= 0) & (index_B < self.num_samples)
        self._bad_index += ((index_B != PADDING) & ~in_range_B).sum()
        index_B = torch.where(in_range_B, index_B, PADDING)
        owner_B = torch.where(in_range_B, index_B // self._rows_per_shard, self.world.rank)
        # 2 rows in the order of their owners, as bytes: index, label, logits
        by_owner_B = torch.argsort(owner_B, stable=True)
        header_B2 = torch.stack([index_B, label_B], dim=1)[by_owner_B]
        payload_BX = torch.cat([header_B2.view(torch.uint8), logits_BC[by_owner_B].view(torch.uint8)], dim=1)
        # 3 counts, known in advance or exchanged; 4 rows, applied at the next call so that backward hides the transfer
        sends, receives = self._routing(owner_B)
        exchange = distributed.exchange_rows(payload_BX, sends, receives)
        self._pending = (exchange, logits_BC.dtype, self.step)
        self.step += 1

    def _routing(self, owner_B: Tensor) -> tuple[list[int], list[int]]:
        if self._counts is not None:
            sends_SW, receives_SW = self._counts
            if self.step >= len(sends_SW) or sum(sends_SW[self.step]) != len(owner_B):
                raise ValueError(f"record call {self.step} of epoch {self.epoch} with {len(owner_B)} rows does not "
                                 "follow the order given to expect()")
            return sends_SW[self.step], receives_SW[self.step]
        if self.world.world_size == 1:
            return [len(owner_B)], [len(owner_B)]
        sends_W = torch.bincount(owner_B, minlength=self.world.world_size)
        receives = distributed.exchange_counts(sends_W)
        return sends_W.tolist(), receives

    def _apply_pending(self) -> None:
        """Write the rows that arrived into the shard."""
        if self._pending is None:
            return
        exchange, dtype, step = self._pending
        self._pending = None
        payload_RX = exchange.wait()
        # Flatten before the view: a single row counts as contiguous whatever its stride.
        header_R2 = payload_RX[:, :_HEADER_BYTES].reshape(-1).view(torch.int64).view(-1, 2)
        logits_RC = payload_RX[:, _HEADER_BYTES:].reshape(-1).view(dtype).view(-1, self.num_classes)
        index_R, label_R = header_R2[:, 0], header_R2[:, 1]
        real_R = index_R != PADDING
        row_R = torch.where(real_R, index_R - self._first, self._end - self._first)

        bad_label_R = real_R & ((label_R < 0) | (label_R >= self.num_classes))
        self._bad_label += bad_label_R.sum()
        label_R = label_R.clamp(0, self.num_classes - 1)
        nonfinite_R = real_R & ~torch.isfinite(logits_RC).all(dim=1)
        self._nonfinite_M.index_add_(0, row_R, nonfinite_R.int())
        now = torch.where(nonfinite_R.any(), step, _NEVER)
        self._nonfinite_step = torch.minimum(self._nonfinite_step, now)

        if self._quarantines:
            logits_RC = torch.where(nonfinite_R[:, None], 0.0, logits_RC)
        logp_RC = log_probabilities(logits_RC)
        previous_RC = self._logp_MC[row_R].float() if self.epoch > 0 else None
        self._scalars_MF.index_copy_(0, row_R, sample_scalars(logits_RC, logp_RC, previous_RC, label_R).T.contiguous())
        self._logp_MC.index_copy_(0, row_R, logp_RC.to(self._logp_MC.dtype))
        self._label_M.index_copy_(0, row_R, label_R)
        self._visits_M.index_add_(0, row_R, torch.ones_like(row_R, dtype=torch.int32))

    # ---- one epoch

    def check(self) -> None:
        """Raise on every rank if any rank saw bad values in this epoch. A collective that reads from the device.

        Raises:
            NonFiniteLogitsError: with epoch, first step and global indices.
            InputError: index or label out of range.
        """
        self._apply_pending()
        rows = self._end - self._first
        is_nonfinite_M = self._nonfinite_M[:rows] > 0
        counts = distributed.sum_over_ranks(torch.stack([
            is_nonfinite_M.sum(), (is_nonfinite_M | (self._quarantined_M != _NOT_QUARANTINED)).sum(), self._bad_index,
            self._bad_label])).tolist()
        num_nonfinite, num_out, num_bad_index, num_bad_label = counts
        if num_bad_index:
            raise InputError(f"epoch {self.epoch}: {num_bad_index} recorded indices lie outside [0, {self.num_samples}) "
                             "and are not -1; record global indices of the full dataset", shared=True)
        if num_bad_label:
            raise InputError(f"epoch {self.epoch}: {num_bad_label} recorded labels lie outside [0, {self.num_classes}); "
                             "check num_classes and the dataset", shared=True)
        if num_nonfinite and (not self._quarantines or num_out > _LARGEST_QUARANTINE * self.num_samples):
            step = int(distributed.min_over_ranks(self._nonfinite_step.clone()))
            named = self._name_rows(is_nonfinite_M)
            too_many = (f"; {num_out} samples in all epochs are more than {_LARGEST_QUARANTINE:.0%} of {self.num_samples}, "
                        "which is the most that may be quarantined" if self._quarantines else "")
            raise NonFiniteLogitsError(
                f"epoch {self.epoch}, step {step}: NaN or infinite logits for {num_nonfinite} samples (global indices {named}"
                f"){too_many}; lower the learning rate, check these images, or put few of them into quarantine (on_nan)",
                shared=True)
        self._num_nonfinite = num_nonfinite

    def end_epoch(self) -> None:
        """Close the epoch: verify coverage, append the trajectory, advance windows.

        Raises:
            CoverageError: some sample was not recorded exactly once; names epoch and counts. On every rank.
            InputError: as `check`.
        """
        self.check()
        rows = self._end - self._first
        visits_M = self._visits_M[:rows]
        missing, repeated = distributed.sum_over_ranks(torch.stack([(visits_M == 0).sum(), (visits_M > 1).sum()])).tolist()
        if missing or repeated:
            named = self._name_rows(visits_M != 1)
            raise CoverageError(f"epoch {self.epoch}: of {self.num_samples} samples {missing} were not recorded and "
                                f"{repeated} more than once (global indices {named}); record every sample exactly once per "
                                "epoch and give rows that merely fill a batch the index -1", shared=True)
        self._quarantine()
        if self._trajectory is not None:
            labels_sha256 = None
            if self.epoch == 0:
                labels_sha256 = fingerprint(self.gather_labels().numpy(), self.num_classes).labels_sha256
            if self._clears_trajectory:
                self._rewind_trajectory(None)
            with distributed.together(self.world):
                if self.epoch == 0:
                    self._trajectory.write_labels(self._label_M[:rows].cpu().numpy(), labels_sha256)
                self._trajectory.append(self.epoch, self._scalars_MF[:rows].T.contiguous().cpu().numpy())
        if self.epoch > 0:
            self._advance_windows()
        self._visits_M.zero_()
        self._nonfinite_M.zero_()
        self._nonfinite_step.fill_(_NEVER)
        self._counts = None
        self.epoch += 1
        self.step = 0

    def _quarantine(self) -> None:
        """Mark the samples whose logits were not finite in this epoch; all marked ones are recorded as zeros."""
        if not self._quarantines:
            return
        rows = self._end - self._first
        is_new_M = (self._nonfinite_M[:rows] > 0) & (self._quarantined_M == _NOT_QUARANTINED)
        self._quarantined_M.masked_fill_(is_new_M, self.epoch)
        self._scalars_MF[:rows].masked_fill_((self._quarantined_M != _NOT_QUARANTINED)[:, None], 0.0)
        if self._num_nonfinite and self._trajectory is not None:
            epoch_of_index = self.quarantined()
            with distributed.together(self.world):
                if self.world.is_main:
                    self._trajectory.write_quarantine(epoch_of_index)

    def _advance_windows(self) -> None:
        """Put this epoch's loss differences into the ring and fold every window that is now full."""
        num_slots, rows = self._delta_KM.shape
        column = SCALARS.index(DELTA_OF_PRESET[self.preset])
        self._delta_KM[self.epoch % num_slots].copy_(self._scalars_MF[:rows, column])
        for window, average_M in zip(self.windows, self._average_AM, strict=True):
            num_differences = differences_per_window(window, self.preset)
            num_windows = self.epoch - num_differences + 1
            if num_windows < 1 or self.epoch >= window.T:
                continue
            epochs = range(self.epoch - num_differences + 1, self.epoch + 1)
            variability_M = window_variability([self._delta_KM[epoch % num_slots] for epoch in epochs], self.preset)
            average_windows(average_M, variability_M, window.beta, num_windows)

    # ---- results

    @property
    def is_complete(self) -> bool:
        """Whether every window has seen its T epochs."""
        return all(self.epoch >= window.T for window in self.windows)

    def gather(self) -> dict[Window, Tensor]:
        """Scores by global index, float32 [N] on the CPU, for every window, on every rank. A collective.

        Raises:
            InputError: a window has not seen its T epochs yet.
        """
        late = [window for window in self.windows if self.epoch < window.T]
        if late:
            raise InputError(f"{late[0]} needs {late[0].T} epochs, {self.epoch} are recorded; train longer or lower T")
        score_NA = distributed.all_gather_shards(self._average_AM.T.contiguous(), self.num_samples, self.world).cpu()
        scores = {window: score_NA[:, column].clone() for column, window in enumerate(self.windows)}
        if out := sorted(self.quarantined()):
            return {window: torch.from_numpy(set_lowest(score_N.numpy(), out)) for window, score_N in scores.items()}
        return scores

    def quarantined(self) -> dict[int, int]:
        """Samples in quarantine: global index -> first epoch with NaN or infinite logits; on every rank. A collective."""
        if not self._quarantines:
            return {}
        epoch_N = distributed.all_gather_shards(self._quarantined_M, self.num_samples, self.world).cpu()
        index = (epoch_N != _NOT_QUARANTINED).nonzero()[:, 0]
        return dict(zip(index.tolist(), epoch_N[index].tolist(), strict=True))

    def gather_labels(self) -> Tensor:
        """Recorded class by global index, int64 [N] on the CPU, on every rank. A collective."""
        rows = self._end - self._first
        return distributed.all_gather_shards(self._label_M[:rows], self.num_samples, self.world).cpu()

    # ---- checkpoints

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that `load_state_dict` needs, also in the middle of an epoch. A collective.

        Tables are DTensors cut along the sample axis that share the scorer's memory (plain tensors without a process
        group): torch.distributed.checkpoint saves them, and loads into those of any number of ranks, as does
        `checkpoint.Checkpoints`.

        Raises:
            InputError: as `check`: bad values are not kept.
        """
        self.check()
        return self._state()

    def _state(self) -> dict[str, Tensor]:
        rows = self._end - self._first
        tables = {"logp": self._logp_MC, "scalars": self._scalars_MF, "label": self._label_M, "visits": self._visits_M,
                  "nonfinite": self._nonfinite_M, "quarantined": self._quarantined_M}
        state = {name: distributed.as_shard(table[:rows], self.num_samples, self.world) for name, table in tables.items()}
        for name, table in (("delta", self._delta_KM), ("average", self._average_AM)):
            state[name] = distributed.as_shard(table, self.num_samples, self.world, dim=1)
        settings = [[window.T, window.K, window.beta, float(self.preset == "paper")] for window in self.windows]
        return state | {"position": torch.tensor([self.epoch, self.step]),
                        "settings": torch.tensor(settings, dtype=torch.float64)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state_dict` was taken. A collective.

        What torch.distributed.checkpoint has loaded into this scorer's own `state_dict` is in place already; other tensors
        are copied. The trajectory loses the epochs that are to be recorded again; those before must be whole.

        Raises:
            InputError: another dataset or other settings, or a trajectory that is damaged or of something else; on every
                rank.
        """
        self._apply_pending()
        mine = self._state()
        with distributed.together(self.world):
            if missing := [name for name in mine if name not in state]:
                raise InputError(f"the state has no {missing[0]!r}; resume with one that ShardedScorer.state_dict made")
            if not torch.equal(state["settings"], mine["settings"]):
                was, now = state["settings"].tolist(), mine["settings"].tolist()
                raise InputError(f"the state was saved with other windows (T, K, beta, preset=paper: {was} instead of {now}); "
                                 "resume with the settings it was saved with")
            for name, table in mine.items():
                have = state[name]
                if (have.dtype, have.shape) != (table.dtype, table.shape):
                    raise InputError(f"the state holds {name!r} as {have.dtype} {tuple(have.shape)}, not {table.dtype} "
                                     f"{tuple(table.shape)}; resume with the num_samples, num_classes and logp_dtype it was "
                                     "saved with")
            quarantined, nonfinite = (distributed.own_rows(state[name]) for name in ("quarantined", "nonfinite"))
            if not self._quarantines and bool((quarantined != _NOT_QUARANTINED).any() | nonfinite.any()):
                raise InputError("the state has samples in quarantine; resume with on_nan='quarantine', as it was saved")
        for name, table in mine.items():
            into, out_of = distributed.own_rows(table), distributed.own_rows(state[name])
            if name not in ("position", "settings") and into.data_ptr() != out_of.data_ptr():
                into.copy_(out_of)
        self.epoch, self.step = state["position"].tolist()
        self._counts = None
        if self._directory is None:
            return
        label_N = self.gather_labels().numpy()
        self._rewind_trajectory(fingerprint(label_N, self.num_classes).labels_sha256 if self.epoch > 0 else None)

    def _rewind_trajectory(self, labels_sha256: str | None) -> None:
        """Remove the epochs from this one on."""
        assert self._directory is not None
        self._clears_trajectory = False
        with distributed.together(self.world):
            if self.world.is_main:
                resume_trajectory(self._directory, SCALARS, self.num_samples, self.num_classes, labels_sha256, self.epoch,
                                  dtype=self._trajectory_dtype)

    def state_bytes(self) -> int:
        """Bytes of per-sample state on this rank's device."""
        tables = (self._logp_MC, self._scalars_MF, self._label_M, self._visits_M, self._nonfinite_M, self._quarantined_M,
                  self._delta_KM, self._average_AM)
        return sum(table.numel() * table.element_size() for table in tables)

    def _name_rows(self, is_bad_M: Tensor) -> str:
        """The first global indices at which `is_bad_M` holds, over all ranks, as text. A collective."""
        found_K = torch.full((_NUM_NAMED,), PADDING, dtype=torch.int64, device=self.world.device)
        bad = is_bad_M.nonzero()[:_NUM_NAMED, 0] + self._first
        found_K[: len(bad)] = bad
        gathered = distributed.all_gather_same(found_K, self.world).view(-1).tolist()
        named = [index for index in gathered if index != PADDING][:_NUM_NAMED]
        return json.dumps(named)[1:-1] + (", ..." if len(named) == _NUM_NAMED else "")
