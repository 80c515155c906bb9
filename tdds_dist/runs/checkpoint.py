"""Checkpoints of a run, by torch.distributed.checkpoint: whole or not there, checked before use,
tensors and JSON only.

    <dir>/step_0000012000/      appears by a rename when all is written and synced
        __0_0.distcp ...        tensors: replicated ones once, sharded ones by every rank
        .metadata               where each tensor lies (of torch.distributed.checkpoint)
        checkpoint.json         step, what the run says of itself, size and SHA-256 of other files
    <dir>/step_....damaged      set aside when a later start found it damaged
    <dir>/step_....abandoned    set aside when a later start could not use it otherwise

A flipped bit loads silently in torch.distributed.checkpoint, and saving into an existing folder can
leave a mixture: hence the hashes, and a fresh folder for every save. Sharded tables are cut anew
when another number of ranks loads them. Nothing in a checkpoint can execute code: `.metadata` is
unpickled with the few names that it needs, and everything that is not a tensor is JSON. The order
of checkpoints is that of their steps; clocks have no part in it.
"""

import copy
import enum
import hashlib
import json
import logging
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan

from tdds_dist.distributed import collectives, host_memory
from tdds_dist.distributed import world as distributed
from tdds_dist.distributed.collectives import together
from tdds_dist.distributed.world import World
from tdds_dist.errors import InputError
from tdds_dist.runs.artifacts import sync, sync_folder, write_atomically
from tdds_dist.runs.directory import complete_steps, link_or_copy

FORMAT = "tdds-checkpoint-1"
_RECORD = "checkpoint.json"
_UNFINISHED = ".unfinished_"  # prefix of a folder that is being written, or was when its job died
log = logging.getLogger("tdds")


@dataclass(frozen=True)
class Checkpoint:
    """A complete and undamaged checkpoint. `record` is what the run said about itself; `step` its
    optimizer steps."""

    path: Path
    step: int
    record: dict[str, Any]
    about: dict[str, Any] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one run; all ranks make one and call it alike. Warnings go to the logger
    `tdds`.

    Args:
        directory: where they lie; made when the first is saved.
        world: the ranks; by default those of the process group.
        keep: how many of the latest stay, at least 2 (the last one may be the one that a disk has
            damaged).
        asynchronous: write in the background: `save` returns once the state is copied to host
            memory.
        stop_on_error: a save that fails ends the run; else it is said, and the run goes on with
            those there are.
        guard: raises InputError when the directory is not ours any more; asked on the main rank
            before every save.
        about: JSON of the main rank that every checkpoint carries beside its record, e.g. config
            and dataset.
        on_complete: called on the main rank when a checkpoint is there, perhaps by another thread.
    """

    def __init__(
        self,
        directory: Path,
        world: World | None = None,
        *,
        keep: int = 2,
        asynchronous: bool = True,
        stop_on_error: bool = False,
        timeout_seconds: float = distributed.TIMEOUT_SECONDS,
        about: Mapping[str, Any] | None = None,
        guard: Callable[[], None] = lambda: None,
        on_complete: Callable[[], object] = lambda: None,
    ):
        if keep < 2:
            raise InputError(
                f"keep={keep} must be at least 2: the newest checkpoint may be damaged"
            )
        self.directory = Path(directory)
        self.num_failed = 0
        self._world = world or distributed.current_world()
        self._keep, self._asynchronous, self._stop_on_error = keep, asynchronous, stop_on_error
        self._guard, self._on_complete, self._about = guard, on_complete, dict(about or {})
        self._group = collectives.control_group(timeout_seconds)
        self._thread: host_memory.DeviceThread | None = None
        self._step_under_way = -1
        self._error: str | None = None  # of the save that ended last; the same on all ranks
        self._defect: BaseException | None = None
        self._saved_step = -1
        self._buffers: list[Tensor] = []

    # ---- saving

    def save(
        self,
        step: int,
        tensors: dict[str, Tensor],
        record: dict[str, Any],
        *,
        files: Mapping[str, Path] | None = None,
        wait: bool = False,
    ) -> None:
        """Save `tensors` (replicated, sharded by `collectives.as_shard`, or of this rank alone
        under a name of its own).

        `record` is JSON of the main rank. `files` are files that go along (linked where the file
        system can). Returns when the state may change again; with `wait` when the checkpoint is on
        disk. A collective.

        Raises:
            InputError: this save (with `wait`) or the one before failed, and `stop_on_error` says
            so; on every rank.
        """
        self.finish()
        if step == self._saved_step:
            return
        folder = self.directory / f"{_UNFINISHED}{_name(step)}"
        with together(self._world):
            if self._world.is_main:
                self._guard()
        try:
            with together(self._world):
                if self._world.is_main:
                    # of saves and deletions that were killed
                    for left in self.directory.glob(f"{_UNFINISHED}*"):
                        shutil.rmtree(left)
                    folder.mkdir(parents=True)
                    for name, file in (files or {}).items():
                        link_or_copy(file, folder / name)
        except InputError as error:
            if self._world.is_main:
                shutil.rmtree(folder, ignore_errors=True)
            self._failed(step, str(error))
            return
        in_background = self._asynchronous and not wait
        if in_background or self._buffers:  # else torch's writer makes a copy of its own
            tensors = self._staged(tensors)
        record = copy.deepcopy(record)  # the caller's lists grow while it is written

        self._defect = RuntimeError(f"the thread of checkpoint {step} did not begin")

        def write() -> None:
            self._defect = None
            try:
                self._error = self._write(step, folder, record, tensors)
            except BaseException as error:  # raised where the main thread looks
                self._defect = error

        if not in_background:
            write()
            self._buffers = []  # the last save for a while: the end of training, or of the job
            self._end(step)
        else:
            # torch's writer asks CUDA for a stream also where all is in host memory
            self._thread = host_memory.DeviceThread(write, self._world.device, f"checkpoint {step}")
            self._thread.start()
            self._step_under_way = step

    def finish(self) -> None:
        """Wait for the save under way, if any. A collective, as `save` is, and with its errors."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._end(self._step_under_way)

    @property
    def is_writing(self) -> bool:
        """Say whether this rank's part of a background save is under way."""
        return self._thread is not None and self._thread.is_alive()

    def close(self) -> None:
        """Finish, and free the process group."""
        try:
            self.finish()
        finally:
            collectives.release_group(self._group)
            self._group = None

    def remove_all(self) -> None:
        """Delete every checkpoint: the run is over and its results are written. Main rank only."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _end(self, step: int) -> None:
        if self._defect is not None:
            error, self._defect = self._defect, None
            raise error
        if self._error is not None:
            self._failed(step, self._error)
        else:
            self._saved_step = step

    def _failed(self, step: int, error: str) -> None:
        self.num_failed += 1
        message = f"checkpoint at step {step} failed ({error})"
        if self._stop_on_error:
            raise InputError(
                f"{message}; make room and run the same command again, or let runs go on without it"
                " by checkpoint.on_error=continue",
                shared=True,
            )
        if self._world.is_main:
            log.warning(f"{message}; the run goes on, the checkpoints before it stay")

    def _staged(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copy the tensors into host memory that is kept from save to save.

        torch's own stager copies a DTensor three times and into fresh memory: 4.2 s of standstill
        for 0.8 GB where this took 0.3 (benchmarks/checkpoint.py).
        """
        parts = [collectives.own_rows(tensor) for tensor in tensors.values()]
        layout = [(part.shape, part.dtype) for part in parts]
        if layout != [(buffer.shape, buffer.dtype) for buffer in self._buffers]:
            self._buffers = []
            sizes = [part.numel() * part.element_size() for part in parts]
            pieces = host_memory.allocate(sizes, self._world.device)
            self._buffers = [
                torch.from_numpy(piece).view(dtype).view(shape)
                for piece, (shape, dtype) in zip(pieces, layout, strict=True)
            ]
        staged = {
            name: collectives.copy_to_host(tensor, buffer)
            for (name, tensor), buffer in zip(tensors.items(), self._buffers, strict=True)
        }
        if self._world.device.type == "cuda":
            torch.cuda.synchronize()
        return staged

    def _write(
        self, step: int, folder: Path, record: dict[str, Any], tensors: dict[str, Tensor]
    ) -> str | None:
        """Write, hash and publish; return what went wrong anywhere, the same on all ranks. In the
        background or not."""
        error, hashes = None, {}
        try:
            with warnings.catch_warnings():
                # "assuming the intent is to save in a single process"
                warnings.simplefilter("ignore")
                dcp.save(
                    tensors,
                    storage_writer=dcp.FileSystemWriter(folder, overwrite=False, sync_files=False),
                    process_group=self._group,
                    no_dist=self._group is None,
                )
            for path in sorted(folder.iterdir()):
                if self._is_mine(path.name):
                    with path.open("rb") as file:
                        sync(file)
                    hashes[path.name] = _describe(path)
        except (CheckpointException, OSError, RuntimeError) as caught:
            error = _one_line(caught)
        outcomes = collectives.gather_objects((error, hashes), self._world, self._group)
        errors = [outcome for outcome, _ in outcomes if outcome]
        if not errors and self._world.is_main:
            files = {name: described for _, found in outcomes for name, described in found.items()}
            try:
                self._publish(step, folder, record, files)
            # the last two: a record that is not JSON
            except (OSError, TypeError, ValueError) as caught:
                errors = [_one_line(caught)]
        if errors and self._world.is_main:
            shutil.rmtree(folder, ignore_errors=True)
        told = collectives.gather_objects(errors[0] if errors else None, self._world, self._group)
        return told[0]

    def _is_mine(self, name: str) -> bool:
        if match := re.match(r"__(\d+)_", name):
            return int(match[1]) == self._world.rank
        return self._world.is_main

    def _publish(
        self, step: int, folder: Path, record: dict[str, Any], files: dict[str, Any]
    ) -> None:
        """Turn a written folder into a checkpoint, by one rename: other programs see either all of
        it or nothing."""
        content = {"format": FORMAT, "step": step, "record": record} | {
            "about": self._about,
            "files": files,
        }
        content = json.loads(json.dumps(content))  # as it is read
        text = json.dumps(content | {"sha256": _digest(content)}, indent=1)
        write_atomically(folder / _RECORD, lambda file: file.write(text.encode()))
        target = self.directory / _name(step)
        if target.exists():  # from before a resume that went further back
            shutil.rmtree(_retire(target))
        folder.rename(target)
        sync_folder(self.directory)
        log.debug(f"checkpoint at step {step} saved")
        self._on_complete()
        for path in [*complete_steps(self.directory).values()][: -self._keep]:
            shutil.rmtree(_retire(path), ignore_errors=True)

    # ---- finding and loading

    def latest(
        self, refuse: Callable[[Checkpoint], str] = lambda checkpoint: ""
    ) -> Checkpoint | None:
        """Return the newest checkpoint that is whole and that `refuse` (asked on the main rank)
        does not refuse.

        Newer ones that are not are said and set aside. None when there is no checkpoint at all. A
        collective.

        Raises:
            InputError: there are checkpoints, and none can be used; lists them all, deletes none.
        """
        world = self._world
        paths = collectives.gather_objects(
            [*complete_steps(self.directory).values()] if world.is_main else None, world
        )[0]
        problems: list[str] = []
        newer: dict[Path, str] = {}
        for path in reversed(paths):
            found, problem = self._examine(path)
            told = collectives.gather_objects(problem, world)
            problem = next((text for text in told if text), "")
            is_whole = not problem
            if is_whole and world.is_main and found is not None:
                try:
                    problem = refuse(found)
                except OSError as error:
                    problem = _one_line(error)
            problem = collectives.gather_objects(problem, world)[0]
            if not problem and found is not None:
                with together(world):
                    if world.is_main:
                        self._set_aside(newer, problems)
                self._saved_step = found.step
                return found
            problems.append(f"{path.name}: {problem}")
            newer[path] = "abandoned" if is_whole else "damaged"
        if problems:
            found_here = f"none of the {len(problems)} checkpoints in {self.directory} can be used"
            raise InputError(
                f"{found_here} ({'; '.join(problems)}); restore one of them, or start over with"
                " --fresh --force",
                shared=True,
            )
        return None

    def _set_aside(self, newer: dict[Path, str], problems: list[str]) -> None:
        """Rename checkpoints that are not used: training goes on from an older one, and theirs is
        not its continuation."""
        for problem in problems:
            log.warning(f"checkpoint {problem}; the one before it is used")
        for path, why in newer.items():
            number = 0
            while (aside := path.with_name(f"{path.name}.{why}{number or ''}")).exists():
                number += 1
            path.rename(aside)

    def _examine(self, path: Path) -> tuple[Checkpoint | None, str]:
        """Read the record and check this rank's share of the files; return the fault, or ""."""
        try:
            content = json.loads((path / _RECORD).read_bytes())
            told = content.pop("sha256")
            if content["format"] != FORMAT:
                return None, f"format {content['format']!r} instead of {FORMAT!r}"
            if told != _digest(content) or path.name != _name(content["step"]):
                return None, f"{_RECORD} is damaged"
            if odd := [name for name in content["files"] if Path(name).name != name]:
                return None, f"it names {odd[0]!r}, which lies outside"
            mine = sorted(content["files"].items())[self._world.rank :: self._world.world_size]
            for name, described in mine:
                found, wanted = _describe(path / name), described["bytes"]
                if found["bytes"] != wanted:
                    return None, f"{name} has {found['bytes']} bytes instead of {wanted}"
                if found != described:
                    return None, f"{name} is damaged (its SHA-256 is another)"
            if ".metadata" not in content["files"]:
                return None, "it has no .metadata"
        except FileNotFoundError as error:
            return None, f"{Path(str(error.filename)).name} is missing"
        except OSError as error:
            return None, f"it cannot be read ({_one_line(error)})"
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return None, f"{_RECORD} is damaged ({_one_line(error)})"
        return Checkpoint(path, content["step"], content["record"], content["about"]), ""

    def describe(self, checkpoint: Checkpoint) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint without their values (device `meta`), by name; sharded
        ones as a whole."""
        try:
            metadata = _Reader(checkpoint.path).read_metadata()
            return {
                name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
                for name, entry in metadata.state_dict_metadata.items()
                if isinstance(entry, TensorStorageMetadata)
            }
        except (
            pickle.UnpicklingError,
            EOFError,
            ValueError,
            TypeError,
            AttributeError,
            LookupError,
            ImportError,
        ) as error:
            raise InputError(
                f"{checkpoint.path} was not written by tdds ({error}); use those of your own run"
            ) from error

    def load(self, checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> None:
        """Read `tensors` in place; sharded ones get their rows of this number of ranks. A
        collective.

        Raises:
            InputError: a tensor that the checkpoint does not hold, or holds in another shape or
                dtype, or that cannot be read; on every rank.
        """
        with together(self._world):
            have = self.describe(checkpoint)
            for name, tensor in tensors.items():
                if name not in have:
                    raise InputError(
                        f"{checkpoint.path} has no tensor {name!r}; resume with the config that it"
                        " was made with"
                    )
                if (have[name].shape, have[name].dtype) != (tensor.shape, tensor.dtype):
                    raise InputError(
                        f"{checkpoint.path} holds {name!r} as {have[name].dtype}"
                        f" {tuple(have[name].shape)}, not {tensor.dtype} {tuple(tensor.shape)};"
                        " resume with the config that it was made with"
                    )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as above
            try:
                dcp.load(
                    tensors,
                    storage_reader=_Reader(checkpoint.path),
                    planner=_TensorsOnly(),
                    process_group=self._group,
                    no_dist=self._group is None,
                )
            except CheckpointException as error:
                raise InputError(
                    f"{checkpoint.path} cannot be read ({_one_line(error)}); check the disk, or"
                    " remove it and use the one before it",
                    shared=True,
                ) from error


def plan_of_rank(tensors: dict[str, Tensor], world: World) -> SavePlan:
    """Return what torch's planner would have this rank write, before ranks that hold the same agree
    on one."""
    planner = DefaultSavePlanner()
    planner.set_up_planner(tensors, is_coordinator=world.is_main)
    return planner.create_local_plan()


def planned_bytes(plans: Mapping[int, SavePlan], world_size: int) -> dict[int, int]:
    """Return the bytes of tensors that each rank of `plans` writes; all other ranks hold what these
    have in common, of which torch gives each tensor to the rank with the least so far."""
    alike = set.intersection(*({item.index for item in plan.items} for plan in plans.values()))
    some = next(iter(plans.values()))
    other = replace(some, items=[item for item in some.items if item.index in alike])
    dealt = DefaultSavePlanner()._dedup_save_plans(
        [plans.get(rank, other) for rank in range(world_size)]
    )
    parts = {
        rank: [item.tensor_data for item in dealt[rank].items if item.tensor_data is not None]
        for rank in plans
    }
    return {
        rank: sum(part.chunk.sizes.numel() * part.properties.dtype.itemsize for part in written)
        for rank, written in parts.items()
    }


class _Reader(dcp.FileSystemReader):
    """torch's reader, with an unpickler for `.metadata` that takes only the few types that belong
    there."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _Unpickler(file).load()
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _TensorsOnly(DefaultLoadPlanner):
    """torch's planner, without unpickling: everything in our checkpoints is a tensor."""

    def load_bytes(self, read_item: Any, value: Any) -> None:
        raise InputError(
            f"{read_item.dest_index.fqn!r} in the checkpoint is not a tensor; it was not written by"
            " tdds"
        )


_IN_METADATA = {  # names that `.metadata` may ask for, by module
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "TensorStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", *(name for name, it in vars(torch).items() if type(it) is torch.dtype)),
    "pathlib": ("PosixPath",),
    "collections": ("OrderedDict",),
}


def _member(kind: type, name: str) -> Any:
    """Return a member of an enumeration, which Python before 3.11.4 pickles by `getattr`."""
    if not (isinstance(kind, type) and issubclass(kind, enum.Enum) and name in kind.__members__):
        raise pickle.UnpicklingError(f".metadata asks for {name} of {kind}, no enumeration")
    return kind[name]


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        if name not in _IN_METADATA.get(module, ()):
            raise pickle.UnpicklingError(
                f".metadata asks for {module}.{name}, which does not belong there"
            )
        return super().find_class(module, name)


def _name(step: int) -> str:
    return f"step_{step:010d}"


def _retire(path: Path) -> Path:
    """Rename a folder that is to be deleted, so that no program sees it half deleted."""
    return path.rename(path.with_name(f"{_UNFINISHED}removal_of_{path.name}"))


def _describe(path: Path) -> dict[str, Any]:
    """Return size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _one_line(error: BaseException) -> str:
    if isinstance(error, CheckpointException) and error.failures:
        rank, (failure, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {_one_line(failure)}"
    text = " ".join(str(error).split())[:300] or type(error).__name__
    if "unexpected pos" in text:  # of torch's writer, in the place of what the file system said
        return f"a file could not be written to its end, as when the disk is full; {text}"
    return text
