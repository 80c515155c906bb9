"""Our training loop and those it is compared with, in one process group of `benchmarks.throughput`:
what a rank does.

Our loop is the trainer of the package with another observer from block to block, so that all blocks
share weights, memory and loader; nothing of it is repeated here.
"""

# B rows of a rank and step, C classes, N images of a block, S steps of a block

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import bare_loops
from tdds_dist import ShardedScorer
from tdds_dist.config.run import Config, parse_config
from tdds_dist.console import Progress
from tdds_dist.data.beton import inspect_beton
from tdds_dist.data.loader import Batch, default_workers
from tdds_dist.distributed import collectives
from tdds_dist.distributed import world as distributed
from tdds_dist.distributed.partition import EpochOrder
from tdds_dist.distributed.world import World
from tdds_dist.runs.directory import RunDir
from tdds_dist.training.engine import Trainer
from tdds_dist.training.feed import Feed, Pass
from tdds_dist.training.training import Training

VARIANTS = {
    "off": "our loop, scoring off",
    "tdds": "our loop with TDDS",
    "all": "our loop with TDDS and the trajectory",
    "off again": "our loop, scoring off, once more",
    "minimal": "minimal FFCV + DDP loop",
    "model": "our loop, images resident",
    "folder": "ImageFolder + DataLoader loop",
    "loader": "our loader alone",
    "ffcv": "FFCV's loader alone",
    "scorer": "scorer alone, with the trajectory",
}
# in every round; the others in every second one
PAIRED = ("off", "tdds", "all", "off again", "minimal")
# K; the benchmark never comes to T, so every epoch does the work of one in the middle of a run
WINDOWS = (10, 20)
EPOCHS = 1_000_000  # of the schedule
# pixels; up to this size images are stored at the size that the network sees
STORED_SIDE, SMALL_SIZE = 400, 64


@dataclass(frozen=True)
class Setting:
    """One network, as it is trained."""

    network: str
    size: int
    rows: int
    num_classes: int
    num_images: int
    num_ranks: int = 1
    rounds: int = 5
    device: str = "cpu"
    compile: bool = False

    @property
    def label(self) -> str:
        """Its name in tables and metrics."""
        ranks = f"{self.num_ranks} rank{'s' if self.num_ranks > 1 else ''}"
        return f"{self.network} {self.size} px, {self.rows} rows, C={self.num_classes}, {ranks}" + (
            ", compiled" if self.compile else ""
        )

    @property
    def side(self) -> int:
        """Of the stored images, pixels."""
        return self.size if self.size <= SMALL_SIZE else STORED_SIDE

    @property
    def source(self) -> str:
        """The images."""
        return f"synthetic:{self.num_images},{min(self.num_classes, self.num_images)},{self.side}"

    @property
    def channels_last(self) -> bool:
        """Transformers gain nothing by it, as in configs/imagenet_swin_t.yaml."""
        return not self.network.startswith(("swin", "vit"))

    @property
    def amp_dtype(self) -> torch.dtype:
        """Of the outputs."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    def config(self, beton: Path, small: Path, run: Path) -> Config:
        """The run that our loop is given."""
        return parse_config(
            {
                "run": {"name": "throughput", "dir": str(run), "device": self.device},
                "data": {
                    "train": str(beton),
                    "val": str(small),
                    "num_classes": self.num_classes,
                    "image_size": self.size,
                    "crop": "pad" if self.side == self.size else "resized",
                    "padding": bare_loops.PADDING,
                    "mean": list(bare_loops.MEAN),
                    "std": list(bare_loops.STD),
                },
                "model": (
                    {"name": self.network, "channels_last": self.channels_last}
                    | ({"compile": True} if self.compile else {})
                ),
                "train": {
                    "epochs": EPOCHS,
                    "global_batch_size": self.rows * self.num_ranks,
                    "lr": bare_loops.LR,
                    "momentum": bare_loops.MOMENTUM,
                    "weight_decay": bare_loops.WEIGHT_DECAY,
                    "amp": "bf16" if self.device == "cuda" else "none",
                },
                "score": {
                    "windows": [{"T": EPOCHS, "K": window} for window in WINDOWS],
                    "final_pass": False,
                },
            },
            self.label,
        )


class Tap(Feed):
    """Feeds the loop: counts what goes there and how long that waits, or serves it one resident
    batch of images instead."""

    def __init__(self, training: Training):
        super().__init__(training)
        self.world = training.world
        self._label_N = torch.from_numpy(training.train_file.label_N).to(
            training.world.device, torch.int64
        )
        self._image = torch.zeros(0)
        self.is_resident = False
        self.num_images, self.wait_seconds = 0, 0.0

    def take(self, which: Pass, first_step: int = 0) -> tuple[EpochOrder, Iterator[Batch]]:
        """Give the loop what it iterates over."""
        self.num_images, self.wait_seconds = 0, 0.0
        if self.is_resident:
            return self.order(which), self._watched(self._resident(self.order(which)))
        order, batches = super().take(which, first_step)
        return order, self._watched(batches)

    def load(self, epoch: int) -> int:
        """Run one epoch of the loader alone; returns the images of this rank."""
        num_images = 0
        for batch in super().take(("train", epoch))[1]:
            num_images += len(batch.index)
            if not len(self._image):
                self._image = batch.image.clone()
        return num_images

    def _watched(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self.wait_seconds += time.perf_counter() - started
            if batch is None:
                return
            self.num_images += len(batch.index)
            yield batch

    def _resident(self, order: EpochOrder) -> Iterator[Batch]:
        """Batches of one epoch as far as indices and labels go; the images are always the same."""
        for index_B, label_B in zip(*self.rows_of(order), strict=True):
            yield Batch(self._image, label_B, index_B)

    def rows_of(self, order: EpochOrder) -> tuple[torch.Tensor, torch.Tensor]:
        """(index_SB, label_SB) of this rank, on its device."""
        _, index_SB = order.of_rank(self.world.rank, self.world.world_size)
        index = torch.from_numpy(index_SB.copy()).to(self.world.device)
        return index, self._label_N[index]


class Scored:
    """A scorer that has seen as many epochs as its windows are long."""

    def __init__(self, setting: Setting, tap: Tap, config: Config, trajectory: Path | None):
        self.scorer = ShardedScorer(
            setting.num_images,
            setting.num_classes,
            config.windows(),
            config.score.preset,
            tap.world.device,
            trajectory=trajectory,
        )
        self._tap = tap
        generator = torch.Generator().manual_seed(tap.world.rank)
        logits_BC = 3.0 * torch.randn(setting.rows, setting.num_classes, generator=generator)
        self._logits_BC = logits_BC.to(tap.world.device, setting.amp_dtype)
        for _ in range(max(WINDOWS)):
            self.epoch()

    def epoch(self) -> int:
        """One epoch of made-up outputs, routed and closed as in training; returns the images of
        this rank."""
        order = self._tap.order(("train", self.scorer.epoch))
        self.scorer.expect(order)
        index_SB, label_SB = self._tap.rows_of(order)
        for index_B, label_B in zip(index_SB, label_SB, strict=True):
            self.scorer.record(index_B, self._logits_BC, label_B)
        self.scorer.end_epoch()
        return index_SB.numel()


class Bench:
    """All variants of a setting on one rank. What is measured for its memory is built, and runs,
    before the rest."""

    # variants that train on one batch of images, again and again
    resident: tuple[str, ...] = ("model",)

    def __init__(self, setting: Setting, folder: Path, run: Path, world: World):
        self.setting, self.world = setting, world
        beton, small = folder / "images.beton", folder / "val.beton"
        config = setting.config(beton, small, run)
        train_file, val_file = inspect_beton(beton), inspect_beton(small)
        training = Training(
            config, world, RunDir(run), train_file, val_file, EPOCHS, config.train.global_batch_size
        )
        self.tap = Tap(training)
        self.trainer = Trainer(training, self.tap)
        self.threads = torch.get_num_threads()
        if world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        everything = Scored(setting, self.tap, config, run / "trajectory")
        self.observed("all", everything.scorer)
        self.peak_bytes = peak_bytes(world.device)
        plain = Scored(setting, self.tap, config, None)
        self.blocks: dict[str, Callable[[], int]] = {
            "loader": lambda: self.tap.load(self.trainer.epoch),
            "off": lambda: self.observed("off"),
            "tdds": lambda: self.observed("tdds", plain.scorer),
            "all": lambda: self.observed("all", everything.scorer),
            "off again": lambda: self.observed("off again"),
            "model": lambda: self.observed("model"),
            "scorer": everything.epoch,
        } | self._bare_loops(folder)

    def recipe(self) -> bare_loops.Recipe:
        """Return what loops without our code are given."""
        setting, world = self.setting, self.world
        return bare_loops.Recipe(
            setting.network,
            setting.num_classes,
            setting.size,
            setting.side == setting.size,
            setting.rows,
            default_workers(world.ranks_per_cpu),
            setting.channels_last,
            setting.compile,
            world.device,
            world.rank,
            world.world_size,
        )

    def _bare_loops(self, folder: Path) -> dict[str, Callable[[], int]]:
        recipe, setting = self.recipe(), self.setting
        batches = bare_loops.ffcv_batches(recipe, folder / "images.beton")
        minimal = bare_loops.BareLoop(recipe, batches)
        usual = bare_loops.BareLoop(
            recipe, bare_loops.FolderBatches(recipe, folder / "tree", setting.num_images)
        )
        return {
            "ffcv": lambda: bare_loops.count(batches),
            "minimal": minimal.epoch,
            "folder": usual.epoch,
        }

    def observed(self, variant: str, scorer: ShardedScorer | None = None) -> int:
        """One epoch of our loop, as `Trainer.run` goes through it; returns the images of this
        rank."""
        trainer = self.trainer
        trainer.training = replace(trainer.training, observer=scorer)
        self.tap.is_resident = variant in self.resident
        trainer.train_epoch()
        if scorer is not None:
            scorer.end_epoch()
        trainer.epoch, trainer.micro = trainer.epoch + 1, 0
        return self.tap.num_images

    def timed(self, variant: str) -> dict[str, Any]:
        """One block of a variant on this rank."""
        if self.world.device.type == "cpu":
            torch.set_num_threads(self.threads)  # FFCV's loader sets them
        self.tap.wait_seconds = 0.0
        collectives.barrier()
        self._synchronize()
        started = time.perf_counter()
        num_images = self.blocks[variant]()
        self._synchronize()
        return {
            "variant": variant,
            "seconds": time.perf_counter() - started,
            "images": num_images,
            "wait_seconds": self.tap.wait_seconds,
        }

    def _synchronize(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()


def measure_rank(setting: Setting, folder: Path, run: Path) -> dict[str, Any]:
    """Every block of this rank, with the round it belongs to, and its peak of memory."""
    with distributed.session(setting.device) as world:
        bench = Bench(setting, folder, run, world)
        # the first gives the resident images
        for variant in ("loader", *(name for name in VARIANTS if name != "loader")):
            bench.timed(variant)
        blocks = []
        with Progress(setting.label, setting.rounds, "rounds", world.is_main) as progress:
            for number in range(setting.rounds):
                blocks += [bench.timed(variant) | {"round": number} for variant in order_of(number)]
                progress.advance()
        bench.trainer.close()
        found = {"blocks": blocks, "peak_bytes": bench.peak_bytes, "threads": bench.threads}
        del bench
    return found


def order_of(number: int) -> list[str]:
    """The variants of a round: those of the ratios next to each other, each of them first in turn,
    there and back."""
    shift = number % len(PAIRED)
    variants = [
        *PAIRED[shift:],
        *PAIRED[:shift],
        *(name for name in VARIANTS if name not in PAIRED and number % 2 == 0),
    ]
    return variants[::-1] if number % 2 else variants


def peak_bytes(device: torch.device) -> int:
    """Most memory so far: allocated by torch on CUDA, resident of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
