"""The training loop: DDP at every world size, AMP, evaluation, metrics. It shows every batch of
outputs to an `Observer` and knows nothing of scores.

Losses are sums over real rows divided by the number of real rows of the whole step (known in
advance on every rank), so that the gradient is that of the mean over the global batch, whatever
padding and world size are (but for batch norm: its statistics are those of one rank's rows, padding
included). Device totals are read at log cadence only.
"""

# B rows of this rank and forward pass, C classes, G rows of a forward pass over all ranks, N
# dataset, M trained samples

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdds_dist.data.loader import BATCHES_AHEAD, torch_threads
from tdds_dist.distributed import collectives
from tdds_dist.distributed import world as distributed
from tdds_dist.distributed.interruption import Preempted
from tdds_dist.distributed.partition import EpochOrder, Visits
from tdds_dist.errors import InputError
from tdds_dist.runs.checkpoint import Checkpoint
from tdds_dist.runs.entry import Start
from tdds_dist.training import metrics, nonfinite, state
from tdds_dist.training.build import (
    InputStage,
    autocast,
    build_mix,
    build_model,
    build_optimizer,
    set_deterministic,
)
from tdds_dist.training.feed import Feed, Pass
from tdds_dist.training.schedule import learning_rate, training_size, training_sizes
from tdds_dist.training.trackers import Trackers
from tdds_dist.training.training import Observer, Training


def fit(training: Training, start: Start | None = None) -> dict[str, Any]:
    """Train, from the start or from `training.resume`; return the result record (final and best
    top-1 and top-5 in percent, images, seconds). `start`: of a stage in its run directory, which
    says where to go on from, and is told how far the training is.

    Raises:
        Preempted: asked to leave; the state is saved, on every rank at the same step.
    """
    if start is not None:
        training = replace(
            training,
            checkpoints=start.checkpoints,
            resume=start.resume,
            pulse=start.pulse,
            guard=start.guard,
        )
    trainer = Trainer(training)
    try:
        with training.interruption.watched():
            result = trainer.run()
    except (Preempted, InputError) as error:
        # all ranks are here; after any other error no rank waits for another
        if getattr(error, "shared", True):
            trainer.close()
        raise
    finally:
        trainer.feed.close()
        trainer.screen.progress.close()
    trainer.close()
    return result


class Trainer:
    """Model, optimizer and loaders of a training, and its state between two steps. `feed`: where
    batches come from."""

    def __init__(self, training: Training, feed: Feed | None = None):
        config, world = training.config, training.world
        self.training = training
        self.rows = training.rows
        self.micro_batch = self.rows * world.world_size
        self.step = 0  # optimizer steps done
        self.epoch = 0
        self.micro = 0  # forward passes done in this epoch
        # loss, correct, images of this epoch
        self.totals_3 = torch.zeros(3, dtype=torch.float64, device=world.device)
        self._all_rows = torch.tensor(self.rows, device=world.device)
        self.observer_seconds = 0.0  # host time that the observer took of this epoch
        self.history: dict[str, Any] = {
            "record": {},
            "best": {},
            "epoch_seconds": [],
            "wall_seconds": [],
            "resumes": 0,
            "train_seconds": 0.0,
            "partial": [0.0, 0.0],
            "images": [],  # of each epoch that has ended
        }
        self.last_save = self.started = time.perf_counter()
        self.steps_since_save = 0
        if world.device.type == "cpu":
            torch.set_num_threads(torch_threads(world.ranks_per_cpu))
        set_deterministic(config.train.deterministic)
        torch.set_float32_matmul_precision(config.train.matmul_precision)
        torch.manual_seed(config.run.seed)
        # of training, and of evaluation, which is never compiled
        self.input_stage, self.eval_stage = (
            InputStage(config.data.mean, config.data.std, config.model.channels_last).to(
                world.device
            )
            for _ in range(2)
        )
        if config.model.compile:
            self.input_stage.compile(dynamic=False)
        model = build_model(
            config.model.name,
            config.data.num_classes,
            cifar_stem=config.model.cifar_stem,
            channels_last=config.model.channels_last,
        ).to(world.device)
        if config.train.sync_batch_norm:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        sizes = training_sizes(config)
        self.model = collectives.data_parallel(
            model,
            world,
            len(sizes) if config.model.compile else 0,
            static_graph=config.train.static_graph,
            compress=config.train.compress_gradients,
        )
        # From here on every rank draws its own numbers (dropout, mixing).
        torch.manual_seed(self._rank_seed())
        self.optimizer = build_optimizer(model, config)
        self.mix = build_mix(config)
        needs_scaling = world.device.type == "cuda" and config.train.amp == "fp16"
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=needs_scaling)
        self.feed = feed or Feed(training)
        self._visit(Visits(training.subset_M, training.importance_N))
        self.follows: Pass | None = None  # what is read after the pass that is under way
        self.trackers = Trackers(config, training.run)
        self.group = collectives.control_group(config.run.timeout_seconds)
        self.consensus = collectives.Consensus(3, self.group)
        self._settle()
        if training.resume is not None:
            self._resume(training.resume)
        elif training.schedule is not None:
            self._visit(training.schedule.decide(0))
        self.good_buffers = nonfinite.GoodBuffers(model) if training.tolerates_nonfinite else None
        self.screen = metrics.Screen(
            training.epochs,
            self.epoch,
            sum(self.history["images"]) + sum(self._images_ahead()),
            world.is_main,
            done=sum(self.history["images"]) + self.micro * self.micro_batch,
        )

    def _visit(self, visits: Visits) -> None:
        """Let the epoch that comes next, or goes on, have these samples and weights."""
        training, subset_M = self.training, visits.subset_M
        self.visits = self.feed.visits = visits
        self.num_images = training.train_file.num_samples if subset_M is None else len(subset_M)
        self.importance_N = None
        if training.importance == "sample" and visits.weight_N is not None:
            self.importance_N = torch.from_numpy(visits.weight_N).to(training.world.device)

    def _images_ahead(self) -> list[int]:
        """Return the images of this epoch and the most of each one after it."""
        epoch, end, schedule = self.epoch, self.training.epochs_run, self.training.schedule
        if schedule is None or epoch >= end:
            return [self.num_images] * (end - epoch)
        return [self.num_images, *map(schedule.most_images, range(epoch + 1, end))]

    def _settle(self) -> None:
        """Make one pass without effect; compile, where asked to, for the images of the first
        step."""
        config, training = self.training.config, self.training
        size = training_size(
            config, training.resume.record["epoch"] if training.resume else 0, training.epochs
        )
        rows = max(2, self.rows) if config.model.compile else 2
        image = torch.zeros(rows, size, size, 3, dtype=torch.uint8, device=training.world.device)
        image = image.permute(0, 3, 1, 2)  # as the loader's lie in memory
        try:
            state.settle_buckets(self.model, self.input_stage(image), self._autocast())
        except torch._dynamo.exc.TorchDynamoException as error:
            raise InputError(
                f"model.compile=true: torch.compile fails on model.name={config.model.name}"
                f" ({' '.join(str(error).split())[:300]}); install what it lacks, or set"
                " model.compile=false"
            ) from error

    def _rank_seed(self, *more: int) -> int:
        entropy = [self.training.config.run.seed, self.training.world.rank, *more]
        return int(np.random.SeedSequence(entropy).generate_state(1)[0])

    # ---- the run

    def run(self) -> dict[str, Any]:
        """Train all epochs that are left; return the result."""
        training, history = self.training, self.history
        while self.epoch < training.epochs_run:
            epoch_started = time.perf_counter()
            is_last = self.epoch + 1 == training.epochs_run
            next_epoch: Pass | None = None if is_last else ("train", self.epoch + 1)
            is_evaluated = is_last or (self.epoch + 1) % training.config.train.eval_every == 0
            self.follows = ("val", self.epoch) if is_evaluated else next_epoch
            if not is_evaluated and training.schedule is not None:
                self.follows = None  # what that visits is not known yet
            record = self.train_epoch()
            with collectives.together(training.world):
                if training.world.is_main:
                    training.guard()
            self._observe(lambda observer: observer.end_epoch(), timed=True)
            history["images"].append(self.num_images)
            if training.schedule is not None and not is_last:
                self._visit(training.schedule.decide(self.epoch + 1))
                if not is_evaluated:
                    self.feed.start(("train", self.epoch + 1))
            record["scoring_share"] = self.observer_seconds / record["epoch_seconds"]
            val_2C = None
            if is_evaluated:
                self.follows = next_epoch
                self.screen.evaluating()
                evaluated, val_2C = self.evaluate(self.epoch)
                record |= evaluated
                self.screen.evaluated(record["val_top1"])
                if not history["best"] or record["val_top1"] > history["best"]["val_top1"]:
                    history["best"] = dict(record)
                    self.save_model("best")
            history["record"] = record
            history["epoch_seconds"].append(record["epoch_seconds"])
            history["wall_seconds"].append(time.perf_counter() - epoch_started)
            history["stopped"] = is_last
            remaining_seconds = self._image_seconds() * sum(self._images_ahead()[1:])
            with collectives.together(training.world):
                if training.world.is_main:
                    if val_2C is not None:
                        training.run.append_val_classes(self.epoch, *val_2C.cpu().numpy())
                    training.run.append_metrics(record)
                    self.trackers.write(record)
                    line = metrics.epoch_line(
                        record, training.epochs, 0.0 if is_last else remaining_seconds
                    )
                    self.screen.progress.tell(line, always=is_last)
            self.epoch, self.micro = self.epoch + 1, 0
            if training.pulse is not None:
                training.pulse.beat(
                    "training",
                    **self._progress(),
                    images_per_second=record["images_per_second"],
                    eta_seconds=0.0 if is_last else remaining_seconds,
                )
            if is_last:
                self.save_model("final")
            self._end_of_epoch(is_last)
        return self._result()

    def _result(self) -> dict[str, Any]:
        training, record, best = self.training, self.history["record"], self.history["best"]
        pruned = {
            "images_seen": sum(self.history["images"]),
            "images_of_full": self.epoch * training.num_samples,
        }
        return {
            "num_images": training.num_samples,
            "epochs": self.epoch,
            "epochs_planned": training.epochs,
            "seed": training.config.run.seed,
            "global_batch_size": training.global_batch_size,
            "steps": record["step"],
            "final_top1": record["val_top1"],
            "final_top5": record["val_top5"],
            "final_loss": record["val_loss"],
            "best_top1": best["val_top1"],
            "best_epoch": best["epoch"],
            "train_seconds": self._train_seconds(),
            "resumes": self.history["resumes"],
            "median_images_per_second": float(
                np.median(np.divide(self.history["images"], self.history["epoch_seconds"]))
            ),
        } | (pruned if training.schedule is not None else {})

    def _train_seconds(self) -> float:
        return self.history["train_seconds"] + time.perf_counter() - self.started

    # ---- training

    def train_epoch(self) -> dict[str, Any]:
        """Train on the rest of this epoch's samples; return the record of its metrics (over all
        ranks)."""
        training, train, epoch = self.training, self.training.config.train, self.epoch
        order, batches = self.feed.take(("train", epoch), self.micro)
        self.model.train()
        seconds_before, self.observer_seconds = self.history["partial"]
        self._observe(lambda observer: observer.expect(order, self.micro))
        if self.micro == 0:
            self.totals_3.zero_()
        lr = weight = 0.0
        started = time.perf_counter()
        self.screen.begin_epoch(epoch)
        for batch in batches:
            distributed.set_position(f"epoch {epoch + 1}, step {self.step + 1}")
            self._look_ahead(order.num_steps - self.micro)
            is_last = self.micro + 1 == order.num_steps
            is_update = (self.micro + 1) % train.accumulation == 0 or is_last
            if self.micro % train.accumulation == 0:
                weight = step_weight(training, order, self.micro, self.visits.weight_N)
            num_rows = order.num_real(self.micro)
            with nullcontext() if is_update else self.model.no_sync():
                self._forward_backward(batch, weight, num_rows)
            self.screen.progress.advance(num_rows)
            self.micro += 1
            if is_update:
                lr = self._update()
                if self.step % train.log_every == 0:
                    self._read_totals(epoch, started - seconds_before)
                self.history["partial"] = [
                    seconds_before + time.perf_counter() - started,
                    self.observer_seconds,
                ]
                if training.pulse is not None and training.pulse.is_due:
                    self._beat(self.micro / order.num_steps)
                if not is_last:
                    self._between_steps()
        if training.world.device.type == "cuda":
            torch.cuda.synchronize()
        epoch_seconds = seconds_before + time.perf_counter() - started
        self.history["partial"] = [0.0, 0.0]
        loss, top1 = self._read_totals(epoch, time.perf_counter() - epoch_seconds)
        collectives.average_buffers(self.model)
        return {
            "epoch": epoch,
            "step": self.step,
            "lr": lr,
            "train_loss": loss,
            "train_top1": top1,
            "epoch_seconds": epoch_seconds,
            "images_per_second": self.num_images / epoch_seconds,
            "memory_bytes": metrics.memory_bytes(training.world.device),
        } | ({"images": self.num_images} if training.schedule is not None else {})

    def _look_ahead(self, num_left: int) -> None:
        """Start what follows when this pass has no more to decode than is on its way, with
        `num_left` steps to go."""
        if self.follows is not None and num_left <= BATCHES_AHEAD:
            self.feed.start(self.follows)
            self.follows = None

    def _forward_backward(self, batch: Any, weight: float, num_rows: int) -> None:
        """Run forward, show the outputs to the observer, run backward.

        `weight`: see `step_weight`; `num_rows`: of all ranks, without padding.
        """
        training, train = self.training, self.training.config.train
        image, target = self.input_stage(batch.image), batch.label
        clean_BC = (
            self._observe(lambda _: self._clean_view(image), timed=True)
            if training.clean_view
            else None
        )
        if self.mix is not None:
            image, target = self.mix(image, batch.label)
        with self._autocast():
            logits_BC = self.model(image)
        shown_BC = logits_BC.detach() if clean_BC is None else clean_BC
        self._observe(
            lambda observer: observer.record(batch.index, shown_BC, batch.label), timed=True
        )
        # Only the last step of an epoch has padding; the others need no mask.
        real_B = None if num_rows == self.micro_batch else batch.index >= 0
        if training.tolerates_nonfinite:
            finite_B = torch.isfinite(logits_BC).all(dim=1)
            real_B = (batch.index >= 0) & finite_B
            logits_BC = torch.where(finite_B[:, None], logits_BC, 0.0)
        loss_B = F.cross_entropy(
            logits_BC.float(), target, reduction="none", label_smoothing=train.label_smoothing
        )
        if real_B is not None:
            loss_B = loss_B * real_B
        loss = weighted = loss_B.sum()
        if self.importance_N is not None:
            weighted = (loss_B * self.importance_N[batch.index.clamp_min(0)]).sum()
        self.scaler.scale(weighted * weight).backward()
        with torch.no_grad():
            correct_B = logits_BC.argmax(dim=1) == batch.label
            num_real = self._all_rows
            if real_B is not None:
                correct_B, num_real = correct_B & real_B, real_B.sum()
            self.totals_3 += torch.stack([loss, correct_B.sum(), num_real])

    def _observe(self, call: Callable[[Observer], Any], timed: bool = False) -> Any:
        """Return what the observer answers, None where there is none; count the host seconds that
        it takes of an epoch when `timed`."""
        if self.training.observer is None:
            return None
        started = time.perf_counter()
        answer = call(self.training.observer)
        self.observer_seconds += (time.perf_counter() - started) * timed
        return answer

    @torch.no_grad()
    def _clean_view(self, image: Tensor) -> Tensor:
        """Return the outputs on the un-mixed image in evaluation mode; leave batch statistics and
        random numbers alone."""
        module = self.model.module
        module.eval()
        with self._autocast():
            logits_BC = module(image)
        module.train()
        return logits_BC

    def _update(self) -> float:
        """Make one optimizer step; return its learning rate."""
        train = self.training.config.train
        steps_per_epoch = self.training.schedule_steps_per_epoch
        lr = learning_rate(
            self._position(steps_per_epoch),
            self.training.epochs * steps_per_epoch,
            train.lr,
            final=train.final_lr,
            warmup_steps=round(train.warmup_epochs * steps_per_epoch),
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.good_buffers is not None:
            if not self.scaler.is_enabled():  # which leaves out such steps itself
                nonfinite.drop_gradients(self.model.parameters())
            self.good_buffers.restore()
        if train.clip_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), train.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return lr

    def _position(self, steps_per_epoch: int) -> float:
        """Return where the learning rate's schedule stands, in steps of full epochs.

        By epochs: each epoch spans as much of the schedule, however many steps it has. Without a
        skipped sample this is the number of steps done, exactly.
        """
        training = self.training
        if training.schedule is None:
            return self.step
        first_pass = (self.micro - 1) // training.config.train.accumulation
        if training.total_images is not None:
            seen = sum(self.history["images"]) + first_pass * training.global_batch_size
            return training.epochs * steps_per_epoch * seen / training.total_images
        num_steps = math.ceil(self.num_images / training.global_batch_size)
        return self.epoch * steps_per_epoch + first_pass * steps_per_epoch / num_steps

    def _read_totals(self, epoch: int, started: float) -> tuple[float, float]:
        """Return mean loss and top-1 (percent) of the epoch that began at `started`, over all
        ranks, and show them; wait for the device. Raises when the loss is not finite."""
        loss, correct, images = collectives.sum_over_ranks(self.totals_3.clone()).tolist()
        if not math.isfinite(loss):
            self._observe(lambda observer: observer.check())
            raise InputError(
                f"epoch {epoch + 1}, up to step {self.step}: the training loss is not finite; lower"
                f" train.lr={self.training.config.train.lr} or add train.warmup_epochs",
                shared=True,
            )
        self.screen.figures(
            loss / images, 100.0 * correct / images, images / (time.perf_counter() - started)
        )
        return loss / images, 100.0 * correct / images

    # ---- how far we are

    def _progress(self) -> dict[str, int]:
        batch = self.training.global_batch_size
        ahead = sum(math.ceil(images / batch) for images in self._images_ahead())
        return {
            "epoch": self.epoch,
            "epochs": self.training.epochs_run,
            "step": self.step,
            "steps": self.step - self._steps_of_epoch() + ahead,
        }

    def _steps_of_epoch(self) -> int:
        """Return the optimizer steps done in this epoch."""
        return -(-self.micro // self.training.config.train.accumulation)

    def _epoch_seconds(self) -> float:
        """Return the seconds of an epoch, evaluation and scoring included: the median so far (0
        before the first)."""
        seconds = self.history["wall_seconds"]
        return float(np.median(seconds)) if seconds else 0.0

    def _image_seconds(self) -> float:
        """Return the seconds of an epoch per image, evaluation and scoring included: the median so
        far (0 before the first)."""
        history = self.history
        per_image = np.divide(history["wall_seconds"], history["images"])
        return float(np.median(per_image)) if len(per_image) else 0.0

    def _beat(self, share: float) -> None:
        """Update status.json when this share of the epoch is done."""
        training, seconds = self.training, self.history["partial"][0]
        assert training.pulse is not None
        done = share * self.num_images
        training.pulse.beat(
            "training",
            **self._progress(),
            images_per_second=done / seconds,
            eta_seconds=(sum(self._images_ahead()) - done)
            * (self._image_seconds() or seconds / done),
        )

    # ---- leaving and going on

    def _between_steps(self) -> None:
        """Save when it is time, or leave when any rank was asked to; all ranks do so at the same
        step, one after the request.
        """
        checkpoints = self.training.checkpoints
        is_writing = checkpoints is not None and checkpoints.is_writing
        asked, due, writing = self.consensus.exchange(
            [bool(self.training.interruption.requested), self._is_time(), is_writing]
        )
        self.steps_since_save += 1
        if asked:
            self._leave()
        # the answer is one step old, and may be from before the last save
        elif due and self.steps_since_save > 1:
            self._save_checkpoint()
        elif checkpoints is not None and not writing and self.steps_since_save > 1:
            checkpoints.finish()  # a save that failed is said now, on all ranks

    def _end_of_epoch(self, is_last: bool) -> None:
        every = self.training.config.checkpoint.every_epochs
        self.steps_since_save = 0  # what `exchange` says next is not of this epoch
        asked, _, _ = self.consensus.settle(
            [bool(self.training.interruption.requested), False, False]
        )
        is_due = self._is_time() or self._is_short_of_time()
        # that of before the last save does not count
        _, due, _ = self.consensus.settle([False, is_due, False])
        if asked:
            self._leave()
        elif is_last or due or (every and self.epoch % every == 0):
            self._save_checkpoint(wait=is_last)

    def _is_time(self) -> bool:
        """Say whether a checkpoint is due by time, by the main rank's clock, which never goes
        back."""
        seconds = self.training.config.checkpoint.every_seconds
        return bool(
            self.training.world.is_main
            and seconds
            and time.perf_counter() - self.last_save >= seconds
        )

    def _is_short_of_time(self) -> bool:
        """Say whether the next epoch does not fit before the time limit, so that the state is saved
        early."""
        return bool(
            self.training.world.is_main
            and time.time() + self._epoch_seconds() >= self.training.interruption.leave_at
        )

    def _leave(self) -> NoReturn:
        """Save the state and raise Preempted, on every rank."""
        asked = collectives.gather_objects(
            self.training.interruption.requested, self.training.world
        )
        name = next(filter(None, asked), "a signal")
        where = f"epoch {min(self.epoch + 1, self.training.epochs)}, step {self.step}"
        checkpoints = self.training.checkpoints
        if checkpoints is None:
            raise Preempted(
                f"{name} at {where}; there are no checkpoints, so the run starts over next time",
                agreed=True,
            )
        checkpoints.finish()
        failed_before = checkpoints.num_failed
        self._save_checkpoint(wait=True)
        is_saved = checkpoints.num_failed == failed_before
        saved = "saved" if is_saved else "NOT saved (see the warning)"
        raise Preempted(
            f"{name}: {saved} at {where}; run the same command again to go on", agreed=True
        )

    def _resume(self, checkpoint: Checkpoint) -> None:
        """Take over the state of a checkpoint, made on this number of ranks or another."""
        record, config = checkpoint.record, self.training.config
        assert self.training.checkpoints is not None
        self.epoch, self.step = record["epoch"], record["step"]
        self.micro = record["steps_of_epoch"] * config.train.accumulation
        self.history = record["history"] | {"resumes": record["history"]["resumes"] + 1}
        # a checkpoint of an older version, which skipped nothing, does not say it
        self.history.setdefault("images", [self.num_images] * self.epoch)
        for name in ("epoch_seconds", "wall_seconds", "images"):
            # older versions could write those of the next epoch too
            self.history[name] = self.history[name][: self.epoch]
        if self.training.schedule is not None and self.epoch < self.training.epochs_run:
            self._visit(self.training.schedule.recall(self.epoch, record["visits"]))
        observed = self._observer_state()
        state.restore(
            self.training.checkpoints,
            checkpoint,
            self.model,
            self.optimizer,
            observed,
            self.totals_3,
            self.training.world,
            self._rank_seed(self.step),
        )
        self._observe(lambda observer: observer.load_state_dict(observed))
        if record["scaler"]:  # empty without loss scaling
            self.scaler.load_state_dict(record["scaler"])

    def _save_checkpoint(self, wait: bool = False) -> None:
        if self.training.checkpoints is None:
            return
        self._require_finite()
        self.steps_since_save = 0
        train_seconds = self._train_seconds()
        record = {
            "epoch": self.epoch,
            "step": self.step,
            "steps_of_epoch": self._steps_of_epoch(),
            "visits": self.visits.digest,
            "world_size": self.training.world.world_size,
            "scaler": self.scaler.state_dict(),
            "history": self.history | {"train_seconds": train_seconds},
        }
        best = self.training.run.models / "best.pt"
        files = {"best.pt": best} if self.training.world.is_main and best.is_file() else {}
        tensors = state.tensors_of(
            self.model, self.optimizer, self._observer_state(), self.totals_3, self.training.world
        )
        self.training.checkpoints.save(self.step, tensors, record, files=files, wait=wait)
        self.last_save = time.perf_counter()

    def _observer_state(self) -> dict[str, Tensor]:
        return self._observe(lambda observer: observer.state_dict()) or {}

    def _require_finite(self) -> None:
        """Raise InputError on every rank, rather than save weights from which every resume would
        fail."""
        module = self.model.module
        values = [
            *module.parameters(),
            *(buffer for buffer in module.buffers() if buffer.is_floating_point()),
        ]
        # weights whose squares overflow are as good as infinite
        is_finite = torch.isfinite(torch.stack(torch._foreach_norm(values))).all()
        if not collectives.min_over_ranks(is_finite.int()).item():
            self._observe(lambda observer: observer.check())
            raise InputError(
                f"epoch {min(self.epoch + 1, self.training.epochs)}, step {self.step}: the weights"
                " are not finite, and are not saved; checkpoints before are good. Lower train.lr="
                f"{self.training.config.train.lr} in a new run, or add train.warmup_epochs",
                shared=True,
            )

    # ---- evaluation and records

    @torch.no_grad()
    def evaluate(self, epoch: int) -> tuple[dict[str, float], Tensor]:
        """Compute loss and top-1 and top-5 accuracy (percent) on the evaluation file, each image
        counted once; and loss and recall of each class, float64 [2, C]."""
        order, batches = self.feed.take(("val", epoch))
        module = self.model.module.eval()
        accuracy = metrics.Accuracy(
            self.training.config.data.num_classes, self.training.world.device
        )
        for step, batch in enumerate(batches):
            self._look_ahead(order.num_steps - step)
            with self._autocast():
                logits_BC = module(self.eval_stage(batch.image)).float()
            accuracy.add(logits_BC, batch.label, batch.index >= 0)
        return accuracy.read()

    def save_model(self, name: str) -> None:
        """Save the weights as models/<name>.pt."""
        with collectives.together(self.training.world):
            if self.training.world.is_main:
                state.save_weights(self.model.module, self.training.run.models / f"{name}.pt")

    def close(self) -> None:
        """Finish reading and writing, and free the process group. A collective."""
        self.feed.close()
        self.trackers.close()
        self.consensus.settle([0, 0, 0])  # end the exchange that is under way
        collectives.release_group(self.group)

    def _autocast(self) -> AbstractContextManager[Any]:
        return autocast(self.training.config, self.training.world.device)


def step_weight(
    training: Training, order: EpochOrder, micro: int, importance_N: np.ndarray | None
) -> float:
    """Return the factor on the sum of losses in the forward passes of the optimizer step that pass
    `micro` of this epoch belongs to: W / rows of the step, times the batch importance.

    DDP averages gradients over ranks, hence the W.
    """
    accumulation = training.config.train.accumulation
    first = micro - micro % accumulation
    end = min(first + accumulation, order.num_steps)
    rows = sum(order.num_real(number) for number in range(first, end))
    factor = training.world.world_size / rows
    if training.importance == "batch" and importance_N is not None:
        index_SG = order.of_rank(0, 1, first, end)[1]
        importance_SG = np.where(index_SG >= 0, importance_N[index_SG], 0.0)
        total = np.bincount(np.zeros(end - first, int), weights=importance_SG.sum(axis=1))[0]
        factor = factor * total / rows
    return float(factor)
