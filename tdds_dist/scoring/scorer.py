"""`ShardedScorer`: the state of the score, cut over ranks by global index, updated while training
runs.

Each rank owns a contiguous block of global indices. A row (index, label, logits) goes from the rank
that visited the sample to its owner in an asynchronous all-to-all: one per step, or among many
ranks one for the rows of several steps. The owner holds the previous epoch's log-probabilities of
its samples and needs nothing else to compute the loss difference. State is N x C once, divided by
the ranks, instead of T x N x C on disk. Nothing in `record` waits for the device: checks write
flags that `check` and `end_epoch` read.
"""

# B rows of a call, C classes, M rows of this rank's shard, N dataset, S steps, W world size, X
# numbers of a packed row

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tdds_dist.config.scores import (
    DELTA_OF_PRESET,
    DENSE,
    Window,
    check_window,
    differences_per_window,
    parse_storage,
)
from tdds_dist.distributed import collectives, world
from tdds_dist.distributed.partition import (
    PADDING,
    EpochOrder,
    SplitSizes,
    rows_per_shard,
    shard_bounds,
)
from tdds_dist.errors import CoverageError, InputError, NonFiniteLogitsError
from tdds_dist.runs.artifacts import fingerprint
from tdds_dist.scoring.kernel_check import LOGIT_DTYPES, kernel_works
from tdds_dist.scoring.quarantine import set_lowest
from tdds_dist.scoring.sample_stats import SCALARS, VISITED
from tdds_dist.scoring.shard import BITS, Arrived, Shard, pack, unpack, update
from tdds_dist.scoring.tdds import (
    average_own_window,
    average_windows,
    put_own_difference,
    window_variability,
)
from tdds_dist.scoring.trajectory import Trajectory, TrajectoryWriter, require_no_trajectory

_NOT_QUARANTINED = -1
# Messages per step that a rank sends at most: among more ranks rows wait for those of later steps.
# Each message has a price whatever it holds; `benchmarks.scaling` says what that comes to.
MESSAGES_PER_STEP = 8
WAITING_BYTES = 64 << 20  # of rows that wait on the rank that visited the samples
# logits that are worth the calls of an update; fewer wait for those of the next steps
WAITING_NUMBERS = 1 << 15
_NUM_NAMED = 8  # offending indices named in an error
_LARGEST_QUARANTINE = 0.01  # share of the samples; beyond it training has diverged


class ShardedScorer:
    """Computes TDDS for several windows during training, in any training loop.

    Args:
        num_samples: N, size of the dataset; global indices are 0 .. N - 1.
        num_classes: C, width of the logits.
        windows: the settings (T, K, beta) to score.
        preset: `official` (the authors' code) or `paper` (the equations); see `scoring.tdds`.
        device: where logits live and state is kept; default CUDA when available.
        logp_dtype: precision of the stored log-probabilities, float32 or float16.
        storage: `dense` keeps those of all classes; `topk:K` the K largest, the label's, and the
            mean of the others.
        trajectory: directory to which every epoch's scalars are appended; None keeps no record.
        trajectory_dtype: precision of the scalars in that directory, float32 or float16. Only
            float32 gives the same scores again bit by bit.
        on_nan: NaN or infinite logits of a sample `stop` the run, or put the sample into
            `quarantine`: it is listed (`quarantined`), recorded as zeros from then on, and scored
            as the lowest of all.
        resume: the trajectory directory may hold epochs already; `load_state_dict` says which of
            them count, and without it none does.
        route_every: steps whose rows travel together; no score depends on it. None: as many as keep
            a rank at 8 messages per step where the order is announced and they fit into 64 MiB,
            else 1.
        partial_epochs: from the second on, epochs may visit a part of the samples, the `subset` of
            the order given to `expect`. An epoch in which a sample is skipped does not exist for
            it: its loss difference is against its last visit, its windows run over its own last
            visits. The trajectory has one more scalar, `visited`.

    Protocol: all ranks of the default process group construct it and call `record` equally often
    per epoch (an empty call counts), then `end_epoch`; without a process group it works alone. When
    the visit order is known, `expect` spares the exchange of counts.

    Raises:
        InputError: settings that cannot be scored.
    """

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        windows: Sequence[Window],
        preset: str = "official",
        device: torch.device | str | None = None,
        *,
        logp_dtype: torch.dtype = torch.float32,
        storage: str = DENSE,
        trajectory: Path | str | None = None,
        trajectory_dtype: torch.dtype = torch.float32,
        on_nan: str = "stop",
        resume: bool = False,
        route_every: int | None = None,
        partial_epochs: bool = False,
    ):
        if num_samples < 1 or num_classes < 2:
            raise InputError(
                f"num_samples={num_samples} must be at least 1 and num_classes={num_classes} at"
                " least 2"
            )
        if not windows:
            raise InputError("windows=[] scores nothing; give at least one Window(T, K, beta)")
        if logp_dtype not in (torch.float32, torch.float16):
            raise InputError(f"logp_dtype={logp_dtype} must be torch.float32 or torch.float16")
        if trajectory_dtype not in (torch.float32, torch.float16):
            raise InputError(
                f"trajectory_dtype={trajectory_dtype} must be torch.float32 or torch.float16"
            )
        if on_nan not in ("stop", "quarantine"):
            raise InputError(f"on_nan={on_nan!r} must be 'stop' or 'quarantine'")
        if route_every is not None and route_every < 1:
            raise InputError(f"route_every={route_every} must be at least 1, or None to choose it")
        parse_storage(storage, num_classes)
        for window in windows:
            check_window(window, preset)
        self.num_samples, self.num_classes, self.preset = num_samples, num_classes, preset
        self.windows = tuple(dict.fromkeys(windows))
        self._quarantines = on_nan == "quarantine"
        self.world = world.current_world(device)
        self.epoch = 0
        self.step = 0
        self._first, self._end = shard_bounds(num_samples, self.world.world_size, self.world.rank)
        self._rows_per_shard = rows_per_shard(num_samples, self.world.world_size)
        self._route_every = route_every
        self._waiting: list[Tensor] = []  # packed rows of this rank that have not left yet
        self._waiting_dtype = torch.float32  # of their logits
        self._split_sizes: SplitSizes | None = None  # where the order is known
        self._scheduled_M: Tensor | None = None  # None: all samples
        self._forget_order()
        self._pending: tuple[collectives.Exchange, torch.dtype, int] | None = None
        self._arrived: list[Arrived] = []
        self._num_nonfinite = 0  # over all ranks, at the last `check`
        self._shard = Shard(
            self._first, self._end, num_classes, storage, logp_dtype, self.world.device
        )
        self._is_fused = kernel_works(self._shard, self._quarantines)
        self._partial_epochs = partial_epochs
        self._allocate()
        self._trajectory = None
        self._clears_trajectory = resume
        if trajectory is not None:
            with collectives.together(self.world):
                if self.world.is_main and not resume:
                    require_no_trajectory(Path(trajectory))
            self._trajectory = TrajectoryWriter(
                trajectory,
                SCALARS + (VISITED,) * partial_epochs,
                num_samples,
                num_classes,
                self._first,
                self._end,
                self.world.is_main,
                dtype=str(trajectory_dtype).removeprefix("torch."),
                scored={"preset": preset, "windows": [asdict(window) for window in self.windows]},
            )

    def _allocate(self) -> None:
        """Allocate the state of this shard that a step does not touch."""
        device, rows = self.world.device, self._shard.num_rows
        num_slots = max(differences_per_window(window, self.preset) for window in self.windows)
        # first bad epoch
        self._quarantined_M = torch.full(
            (rows,), _NOT_QUARANTINED, dtype=torch.int32, device=device
        )
        # slot of the difference into epoch t: t mod K
        self._delta_KM = torch.zeros(num_slots, rows, device=device)
        self._average_AM = torch.zeros(len(self.windows), rows, device=device)
        # epochs, before this one, in which each sample was visited
        self._num_visits_M: Tensor | None = None
        if self._partial_epochs:
            self._num_visits_M = torch.zeros(rows, dtype=torch.int32, device=device)

    # ---- one step

    def expect(self, order: EpochOrder, first_step: int = 0) -> None:
        """Announce the visit order of the epoch that starts now, as `distributed.partition`
        computes it.

        Then `record` must be called with exactly those rows, step by step, and exchanges no counts.
        A resume in the middle of an epoch gives the order of the whole epoch, and the first step
        that is not recorded yet.

        Raises:
            ValueError: a subset without `partial_epochs`, in the first epoch, or not of [0, N).
        """
        self._forget_order()
        if order.subset is not None:
            self._scheduled_M = self._mask_of(order.subset)
        self.step = self._first_step = first_step
        rank, world_size = self.world.rank, self.world.world_size
        self._split_sizes = SplitSizes(order, rank, world_size, self.num_samples)
        self._num_steps, self._rows = order.num_steps, self._split_sizes.num_rows
        self._group = self._route_every or steps_together(world_size, self._rows, self.num_classes)
        if world_size > 1:
            self._split_sizes.begin(first_step, first_step + self._group)

    def _mask_of(self, subset: np.ndarray) -> Tensor:
        """Return which samples of this shard are in the subset, bool [M]."""
        if not self._partial_epochs or self.epoch == 0:
            raise ValueError(
                f"epoch {self.epoch + 1} visits {len(subset)} of {self.num_samples} samples; only"
                " epochs after the first may skip some, with partial_epochs=True"
            )
        if len(subset) and not 0 <= subset.min() <= subset.max() < self.num_samples:
            raise ValueError(f"the subset holds indices outside [0, {self.num_samples})")
        mask_M = np.zeros(self._shard.num_rows, dtype=bool)
        mask_M[subset[(subset >= self._first) & (subset < self._end)] - self._first] = True
        return torch.from_numpy(mask_M).to(self.world.device)

    def record(self, index_B: Tensor, logits_BC: Tensor, label_B: Tensor) -> None:
        """Record one batch: any rank, any order, each sample once per epoch.

        Args:
            index_B: int64 [B] global indices; -1 marks a padding row, which is ignored.
            logits_BC: floating point [B, C].
            label_B: int64 [B] classes.

        All three may be reused once the device has done what is queued on it (on the CPU: at once).

        Raises:
            ValueError: shapes or dtypes that do not fit. Values are checked later, by `check` or
            `end_epoch`.
        """
        device = self.world.device
        if (
            logits_BC.ndim != 2
            or logits_BC.shape[1] != self.num_classes
            or not logits_BC.is_floating_point()
        ):
            raise ValueError(
                f"logits must be floating point [B, {self.num_classes}], got {logits_BC.dtype} "
                f"{tuple(logits_BC.shape)}"
            )
        if index_B.shape != label_B.shape or index_B.shape != logits_BC.shape[:1]:
            raise ValueError(
                f"index {tuple(index_B.shape)}, logits {tuple(logits_BC.shape)} and label "
                f"{tuple(label_B.shape)} must agree in their first axis"
            )
        if index_B.dtype != torch.int64 or label_B.dtype != torch.int64:
            raise ValueError(
                f"index and label must be int64, got {index_B.dtype} and {label_B.dtype}"
            )
        if self._split_sizes is not None and (
            self.step >= self._num_steps or len(index_B) != self._rows
        ):
            raise ValueError(
                f"record call {self.step} of epoch {self.epoch + 1} with {len(index_B)} rows"
                " does not follow the order given to expect()"
            )
        if self._waiting and self._waiting_dtype != logits_BC.dtype:
            self._send()
        if len(self._waiting) + 1 == self._group:
            self._receive()
        payload_BX = pack(
            index_B.to(device, non_blocking=True),
            label_B.to(device, non_blocking=True),
            logits_BC.detach().to(device),
        )
        self._waiting.append(payload_BX)
        self._waiting_dtype = logits_BC.dtype
        self.step += 1
        if (self.step - self._first_step) % self._group == 0 or self.step == self._num_steps:
            self._send()

    def _send(self) -> None:
        """Let the rows that wait here begin their way to their owners. A collective: every rank
        calls it after the same step.

        They are on their way until the next call, so that forward and backward hide the transfer.
        """
        if not self._waiting:
            return
        self._receive()
        first = self.step - len(self._waiting)
        payload_RX = self._waiting[0] if len(self._waiting) == 1 else torch.cat(self._waiting)
        self._waiting = []
        by_owner_R, sends, receives = self._routing(payload_RX, first)
        if by_owner_R is not None:
            payload_RX = payload_RX.index_select(0, by_owner_R)
        # gloo knows no int16
        exchange = collectives.exchange_rows(payload_RX.view(torch.uint8), sends, receives)
        self._pending = (exchange, self._waiting_dtype, first)

    def _routing(
        self, payload_RX: Tensor, first: int
    ) -> tuple[Tensor | None, list[int], list[int]]:
        """Return the rows of the steps from `first` on in the order of their owners (None: as they
        are), how many go to each rank, how many come from each.

        Padding rows and indices out of range stay here.
        """
        world_size = self.world.world_size
        if world_size == 1:
            return None, [len(payload_RX)], [len(payload_RX)]
        index_R = unpack(payload_RX, self._waiting_dtype)[0]
        if self._split_sizes is not None:
            ahead = self._group - (self.step - self._first_step) % self._group
            sends, receives = self._split_sizes.take(first, self.step, self.step + ahead)
            if self.step < self._num_steps:  # no padding: by index is by owner
                return torch.argsort(index_R), sends, receives
        in_range_R = (index_R >= 0) & (index_R < self.num_samples)
        owner_R = torch.where(in_range_R, index_R // self._rows_per_shard, self.world.rank)
        if self._split_sizes is None:
            sends_W = torch.bincount(owner_R, minlength=world_size)
            receives = collectives.exchange_counts(sends_W)
            sends = sends_W.tolist()
        return torch.argsort(owner_R, stable=True), sends, receives

    def _receive(self) -> None:
        """Take over the rows that arrived, and write them into the shard once there are enough."""
        if self._pending is None:
            return
        exchange, dtype, step = self._pending
        self._pending = None
        if self._arrived and self._arrived[0].dtype != dtype:
            self._write_arrived()
        self._arrived.append(Arrived(exchange.wait().view(BITS[dtype.itemsize]), dtype, step))
        if (
            self._is_fused
            or sum(len(part.payload_RX) for part in self._arrived) * self.num_classes
            >= WAITING_NUMBERS
        ):
            self._write_arrived()

    def _write_arrived(self) -> None:
        arrived, self._arrived = self._arrived, []
        if self._is_fused and arrived and arrived[0].dtype in LOGIT_DTYPES:
            from tdds_dist.scoring import shard_triton  # loads Triton

            shard_triton.update(self._shard, arrived, self.epoch > 0, self._quarantines)
        else:
            update(self._shard, arrived, self.epoch > 0, self._quarantines)

    def _forget_order(self) -> None:
        """Begin an epoch of unknown order, or the rest of one, at this step."""
        self._waiting = []
        self._group = self._route_every or 1  # steps whose rows travel together
        self._first_step = self.step  # of the first group
        self._num_steps = self._rows = -1  # of the epoch; per step
        self._scheduled_M = None
        self._split_sizes = None

    def _apply_pending(self) -> None:
        """Write all rows that arrived or are on their way into the shard."""
        self._receive()
        self._write_arrived()

    # ---- one epoch

    def check(self) -> None:
        """Raise on every rank if any rank saw bad values in this epoch. A collective that reads
        from the device. Rows that wait for those of later steps (`route_every`) are seen later.

        Raises:
            NonFiniteLogitsError: with epoch, first step and global indices.
            InputError: index or label out of range.
        """
        self._apply_pending()
        rows = self._shard.num_rows
        is_nonfinite_M = self._shard.nonfinite_M[:rows] > 0
        counts = collectives.sum_over_ranks(
            torch.stack(
                [
                    is_nonfinite_M.sum(),
                    (is_nonfinite_M | (self._quarantined_M != _NOT_QUARANTINED)).sum(),
                    self._shard.bad_index,
                    self._shard.bad_label,
                ]
            )
        ).tolist()
        num_nonfinite, num_out, num_bad_index, num_bad_label = counts
        if num_bad_index:
            raise InputError(
                f"epoch {self.epoch + 1}: {num_bad_index} recorded indices lie outside [0,"
                f" {self.num_samples}) and are not -1, or do not follow the order given to"
                " expect(); record global indices of the full dataset, as announced",
                shared=True,
            )
        if num_bad_label:
            raise InputError(
                f"epoch {self.epoch + 1}: {num_bad_label} recorded labels lie outside [0,"
                f" {self.num_classes}); check num_classes and the dataset",
                shared=True,
            )
        if num_nonfinite and (
            not self._quarantines or num_out > _LARGEST_QUARANTINE * self.num_samples
        ):
            step = int(collectives.min_over_ranks(self._shard.nonfinite_step.clone()))
            last = min(step + self._group, self.step) - 1
            steps = f"step {step}" if last == step else f"steps {step} to {last}"
            named = self._name_rows(is_nonfinite_M)
            too_many = (
                f"; {num_out} samples in all epochs are more than {_LARGEST_QUARANTINE:.0%} of"
                f" {self.num_samples}, which is the most that may be quarantined"
                if self._quarantines
                else ""
            )
            raise NonFiniteLogitsError(
                f"epoch {self.epoch + 1}, {steps}: NaN or infinite logits for {num_nonfinite}"
                f" samples (global indices {named}){too_many}; lower the learning rate, check these"
                " images, or put few of them into quarantine (on_nan)",
                shared=True,
            )
        self._num_nonfinite = num_nonfinite

    def end_epoch(self) -> None:
        """Close the epoch: verify coverage, append the trajectory, advance windows.

        Raises:
            CoverageError: some scheduled sample was not recorded exactly once, or another one was;
            names epoch and counts. On every rank. InputError: as `check`.
        """
        self._send()
        self.check()
        rows = self._shard.num_rows
        visits_M = self._shard.visits_M[:rows]
        due_M = torch.ones_like(visits_M)
        if self._scheduled_M is not None:
            due_M.copy_(self._scheduled_M)
        scheduled, missing, repeated = collectives.sum_over_ranks(
            torch.stack([due_M.sum(), (visits_M < due_M).sum(), (visits_M > due_M).sum()])
        ).tolist()
        if missing or repeated:
            named = self._name_rows(visits_M != due_M)
            raise CoverageError(
                f"epoch {self.epoch + 1}: of {scheduled} samples {missing} were not recorded"
                f" and {repeated} more than once"
                + (" or though not scheduled" if self._scheduled_M is not None else "")
                + f" (global indices {named}); record every sample exactly once per epoch and give"
                " rows that merely fill a batch the index -1",
                shared=True,
            )
        self._quarantine()
        if self._trajectory is not None:
            if self.epoch == 0:
                labels_sha256 = self._labels_sha256()
            if self._clears_trajectory:
                self._rewind_trajectory(None)
            with collectives.together(self.world):
                if self.epoch == 0:
                    self._trajectory.write_labels(
                        self._shard.label_M[:rows].cpu().numpy(), labels_sha256
                    )
                columns_MF = self._shard.scalars_MF[:rows]
                if self._partial_epochs:
                    columns_MF = torch.cat([columns_MF, visits_M[:, None]], dim=1)
                self._trajectory.append(self.epoch, columns_MF.T.contiguous().cpu().numpy())
        if self._num_visits_M is not None:
            self._advance_own_windows(self._num_visits_M, visits_M > 0)
            self._num_visits_M += visits_M
        elif self.epoch > 0:
            self._advance_windows()
        self._shard.begin_epoch()
        self.epoch += 1
        self.step = 0
        self._forget_order()

    def _quarantine(self) -> None:
        """Mark the samples whose logits were not finite in this epoch; all marked ones are recorded
        as zeros."""
        if not self._quarantines:
            return
        rows = self._shard.num_rows
        is_new_M = (self._shard.nonfinite_M[:rows] > 0) & (self._quarantined_M == _NOT_QUARANTINED)
        self._quarantined_M.masked_fill_(is_new_M, self.epoch)
        self._shard.scalars_MF[:rows].masked_fill_(
            (self._quarantined_M != _NOT_QUARANTINED)[:, None], 0.0
        )
        if self._num_nonfinite and self._trajectory is not None:
            epoch_of_index = self.quarantined()
            with collectives.together(self.world):
                if self.world.is_main:
                    self._trajectory.write_quarantine(epoch_of_index)

    def _advance_windows(self) -> None:
        """Put this epoch's loss differences into the ring and fold every window that is now
        full."""
        num_slots, rows = self._delta_KM.shape
        column = SCALARS.index(DELTA_OF_PRESET[self.preset])
        self._delta_KM[self.epoch % num_slots].copy_(self._shard.scalars_MF[:rows, column])
        for window, average_M in zip(self.windows, self._average_AM, strict=True):
            num_differences = differences_per_window(window, self.preset)
            num_windows = self.epoch - num_differences + 1
            if num_windows < 1 or self.epoch >= window.T:
                continue
            epochs = range(self.epoch - num_differences + 1, self.epoch + 1)
            variability_M = window_variability(
                [self._delta_KM[epoch % num_slots] for epoch in epochs], self.preset
            )
            average_windows(average_M, variability_M, window.beta, num_windows)

    def _advance_own_windows(self, num_visits_M: Tensor, is_visited_M: Tensor) -> None:
        """Do as `_advance_windows`, each sample by its own visits, of which there were
        `num_visits_M` before this epoch."""
        column = SCALARS.index(DELTA_OF_PRESET[self.preset])
        put_own_difference(
            self._delta_KM,
            self._shard.scalars_MF[: len(num_visits_M), column],
            num_visits_M,
        )
        for window, average_M in zip(self.windows, self._average_AM, strict=True):
            if self.epoch < window.T:
                average_own_window(
                    average_M, self._delta_KM, num_visits_M, is_visited_M, window, self.preset
                )

    # ---- results

    def gather_last(self, *names: str) -> Tensor:
        """Return these scalars of each sample's last visit by global index, float32 [N, number of
        names] on the CPU, on every rank; between two epochs. A collective."""
        columns = [SCALARS.index(name) for name in names]
        return self._gathered(self._shard.scalars_MF[: self._shard.num_rows, columns])

    def gather_so_far(self, window: Window) -> Tensor:
        """Return what a window has scored up to now by global index, float32 [N] on the CPU, on
        every rank: after t epochs, the score of the same K and beta with T = t. A collective."""
        return self._gathered(self._average_AM[self.windows.index(window)])

    @property
    def has_trajectory(self) -> bool:
        """Say whether each epoch's scalars are recorded on disk."""
        return self._trajectory is not None

    def gather_recorded(
        self, scalar: str, num_epochs: int, compute: Callable[[np.ndarray], np.ndarray]
    ) -> Tensor:
        """Return what is computed of a scalar in the trajectory, by global index, float32 [N, X] on
        the CPU, on every rank; between two epochs. A collective.

        `compute` gets the scalar of the first epochs for the samples of this rank, float32
        [num_epochs, M], and returns float32 [M, X].

        Raises:
            InputError: no trajectory, or a damaged one; on every rank.
        """
        with collectives.together(self.world):
            if self._trajectory is None:
                raise InputError("this score is computed from the trajectory; give the scorer one")
            recorded = Trajectory(self._trajectory.directory, num_epochs)
            values_TM = recorded.read(scalar, num_epochs, range(self._first, self._end))
            found_MX = torch.from_numpy(compute(values_TM)).to(self.world.device)
        return self._gathered(found_MX)

    def gather(self) -> dict[Window, Tensor]:
        """Return the scores by global index, float32 [N] on the CPU, for every window, on every
        rank. A collective.

        Raises:
            InputError: a window has not seen its T epochs yet.
        """
        late = [window for window in self.windows if self.epoch < window.T]
        if late:
            raise InputError(
                f"{late[0]} needs {late[0].T} epochs, {self.epoch} are recorded; train longer or"
                " lower T"
            )
        score_NA = self._gathered(self._average_AM.T.contiguous())
        out = sorted(self.quarantined())
        return {
            window: torch.from_numpy(set_lowest(score_N.numpy(), out))
            for window, score_N in zip(self.windows, score_NA.unbind(1), strict=True)
        }

    def quarantined(self) -> dict[int, int]:
        """Return the samples in quarantine: global index -> first epoch with NaN or infinite
        logits; on every rank. A collective."""
        if not self._quarantines:
            return {}
        epoch_N = self._gathered(self._quarantined_M)
        index = (epoch_N != _NOT_QUARANTINED).nonzero()[:, 0]
        return dict(zip(index.tolist(), epoch_N[index].tolist(), strict=True))

    def gather_labels(self) -> Tensor:
        """Return the recorded class by global index, int64 [N] on the CPU, on every rank. A
        collective."""
        return self._gathered(self._shard.label_M[: self._shard.num_rows])

    def _gathered(self, rows_MX: Tensor) -> Tensor:
        """Gather a table of this shard by global index, [N, ...] on the CPU, on every rank."""
        return collectives.all_gather_shards(rows_MX, self.num_samples, self.world).cpu()

    def _labels_sha256(self) -> str:
        return fingerprint(self.gather_labels().numpy(), self.num_classes).labels_sha256

    # ---- checkpoints

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that `load_state_dict` needs, also in the middle of an epoch. A
        collective.

        Tables are DTensors cut along the sample axis that share the scorer's memory (plain tensors
        without a process group): torch.distributed.checkpoint saves them, and loads into those of
        any number of ranks, as does `runs.checkpoint.Checkpoints`.

        Raises:
            InputError: as `check`: bad values are not kept.
        """
        self._send()
        self.check()
        return self._state()

    def _tables(self) -> dict[str, Tensor]:
        """Return what is kept of each sample but for its windows, by name; M rows or more."""
        tables = self._shard.tables() | {"quarantined": self._quarantined_M}
        if self._num_visits_M is not None:
            tables["num_visits"] = self._num_visits_M
        return tables

    def _state(self) -> dict[str, Tensor]:
        rows = self._shard.num_rows
        state = {
            name: collectives.as_shard(table[:rows], self.num_samples, self.world)
            for name, table in self._tables().items()
        }
        for name, table in (("delta", self._delta_KM), ("average", self._average_AM)):
            state[name] = collectives.as_shard(table, self.num_samples, self.world, dim=1)
        settings = [
            [window.T, window.K, window.beta, float(self.preset == "paper")]
            for window in self.windows
        ]
        return state | {
            "position": torch.tensor([self.epoch, self.step]),
            "settings": torch.tensor(settings, dtype=torch.float64),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state_dict` was taken. A collective.

        What torch.distributed.checkpoint has loaded into this scorer's own `state_dict` is in place
        already; other tensors are copied. The trajectory loses the epochs that are to be recorded
        again; those before must be whole.

        Raises:
            InputError: another dataset or other settings, or a trajectory that is damaged or of
                something else; on every rank.
        """
        self._apply_pending()
        mine = self._state()
        with collectives.together(self.world):
            if ({"logp", "topk_logp"} - mine.keys()) & state.keys():
                raise InputError(
                    f"the state was saved with another storage than {self._shard.storage!r}; resume"
                    " with the one it was saved with"
                )
            if "num_visits" in state and self._num_visits_M is None:
                raise InputError("the state was saved with partial_epochs=True; resume with it")
            if missing := [name for name in mine if name not in state]:
                raise InputError(
                    f"the state has no {missing[0]!r}; resume with one that"
                    " ShardedScorer.state_dict made"
                )
            if not torch.equal(state["settings"], mine["settings"]):
                was, now = state["settings"].tolist(), mine["settings"].tolist()
                raise InputError(
                    f"the state was saved with other windows (T, K, beta, preset=paper: {was}"
                    f" instead of {now}); resume with the settings it was saved with"
                )
            for name, table in mine.items():
                have = state[name]
                if (have.dtype, have.shape) != (table.dtype, table.shape):
                    raise InputError(
                        f"the state holds {name!r} as {have.dtype} {tuple(have.shape)}, not"
                        f" {table.dtype} {tuple(table.shape)}; resume with the num_samples,"
                        " num_classes, logp_dtype and storage it was saved with"
                    )
            quarantined, nonfinite = (
                collectives.own_rows(state[name]) for name in ("quarantined", "nonfinite")
            )
            if not self._quarantines and bool(
                (quarantined != _NOT_QUARANTINED).any() | nonfinite.any()
            ):
                raise InputError(
                    "the state has samples in quarantine; resume with on_nan='quarantine', as it"
                    " was saved"
                )
        for name, table in mine.items():
            into, out_of = collectives.own_rows(table), collectives.own_rows(state[name])
            if name not in ("position", "settings") and into.data_ptr() != out_of.data_ptr():
                into.copy_(out_of)
        self.epoch, self.step = state["position"].tolist()
        self._forget_order()
        if self._trajectory is not None:
            self._rewind_trajectory(self._labels_sha256() if self.epoch > 0 else None)

    def _rewind_trajectory(self, labels_sha256: str | None) -> None:
        """Remove the epochs from this one on."""
        assert self._trajectory is not None
        self._clears_trajectory = False
        with collectives.together(self.world):
            if self.world.is_main:
                self._trajectory.resume(self.epoch, labels_sha256)

    def state_bytes(self) -> int:
        """Return the bytes of per-sample state on this rank's device."""
        tables = (*self._tables().values(), self._delta_KM, self._average_AM)
        return sum(table.numel() * table.element_size() for table in tables)

    def _name_rows(self, is_bad_M: Tensor) -> str:
        """Return the first global indices at which `is_bad_M` holds, over all ranks, as text. A
        collective."""
        found_K = torch.full((_NUM_NAMED,), PADDING, dtype=torch.int64, device=self.world.device)
        bad = is_bad_M.nonzero()[:_NUM_NAMED, 0] + self._first
        found_K[: len(bad)] = bad
        gathered = collectives.all_gather_shards(
            found_K, _NUM_NAMED * self.world.world_size, self.world
        ).tolist()
        named = [index for index in gathered if index != PADDING][:_NUM_NAMED]
        return json.dumps(named)[1:-1] + (", ..." if len(named) == _NUM_NAMED else "")


def steps_together(world_size: int, rows: int, num_classes: int) -> int:
    """Return the steps whose rows travel together: the fewest that keep a rank at MESSAGES_PER_STEP
    messages per step, if those rows (`rows` of each step, with logits of 4 bytes) fit into
    WAITING_BYTES."""
    fitting = WAITING_BYTES // (rows * (4 * num_classes + 16))
    return max(1, min(-(-(world_size - 1) // MESSAGES_PER_STEP), fitting))
