"""Checkpoints: what is loaded is bitwise what was saved, on any number of ranks; what is damaged,
half written or hostile is not loaded, and a run that dies at any moment of a save has a whole
checkpoint left."""

import errno
import functools
import io
import itertools
import json
import os
import pickle
import resource
import shutil
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystem

from tdds_dist.console import speaking
from tdds_dist.distributed import collectives, host_memory
from tdds_dist.distributed import world as distributed
from tdds_dist.distributed.collectives import as_shard, own_rows
from tdds_dist.distributed.partition import shard_bounds
from tdds_dist.distributed.world import World
from tdds_dist.errors import InputError
from tdds_dist.runs import checkpoint
from tdds_dist.runs.checkpoint import Checkpoint, Checkpoints
from tests.ranks import catch, exit_codes, run_ranks

LONE = World(0, 0, 1, 1, torch.device("cpu"))
N = 10
REPLICATED = ("weight", "half", "image", "count", "mask", "bytes", "empty")
SHARDED = {"logp": 0, "label": 0, "visits": 0, "rough": 1, "flags": 0}  # name: sample axis


def random_bytes(generator, *shape):
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


def whole(seed, num_samples=N):
    """Every tensor as it is in all, filled from `seed`; the bits are arbitrary where that is
    possible."""
    generator = torch.Generator().manual_seed(seed)

    def bits(dtype, *shape):
        return random_bytes(generator, *shape[:-1], shape[-1] * dtype.itemsize).view(dtype)

    return {
        "weight": bits(torch.float32, 3, 4, 5),
        "half": bits(torch.float16, 7),
        "image": bits(torch.float32, 2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "count": torch.tensor(2**40 + seed),
        "mask": bits(torch.uint8, 9) > 127,
        "bytes": bits(torch.uint8, 11),
        "empty": torch.zeros(0, 3),
        "logp": bits(torch.float32, num_samples, 3),
        "label": bits(torch.int64, num_samples),
        "visits": bits(torch.int32, num_samples),
        "rough": bits(torch.float16, 4, num_samples),
        "flags": bits(torch.uint8, num_samples) > 127,
    }


def of_rank(seed, rank):
    """The tensors of one rank alone, of a size of its own."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return {f"rank{rank:05d}/random": random_bytes(generator, 5 + rank)}


def share(tensors, world, num_samples=N):
    """`whole` as this rank holds it."""
    first, end = shard_bounds(num_samples, world.world_size, world.rank)
    mine = {}
    for name, tensor in tensors.items():
        if (dim := SHARDED.get(name)) is None:
            mine[name] = tensor.clone()
        else:
            block = tensor.narrow(dim, first, end - first)
            block = block.clone(memory_format=torch.contiguous_format)
            mine[name] = as_shard(block, num_samples, world, dim=dim)
    return mine


def state(seed, world, num_samples=N):
    """What a rank saves."""
    return share(whole(seed, num_samples), world, num_samples) | of_rank(seed, world.rank)


def blank(world, seed=0, num_samples=N, ranks=()):
    """Tensors to load into, with other bits."""
    tensors = whole(seed + 999, num_samples)
    kept = share(tensors, world, num_samples)
    for rank in ranks:
        kept |= {name: torch.zeros_like(tensor) for name, tensor in of_rank(seed, rank).items()}
    return kept


def differing(found, seed, world, num_samples=N, ranks=()):
    """Names of loaded tensors that are not bitwise what `state` saved."""
    expected = share(whole(seed, num_samples), world, num_samples)
    for rank in ranks:
        expected |= of_rank(seed, rank)
    return [name for name in expected if bits_of(found[name]) != bits_of(expected[name])]


def bits_of(tensor):
    return own_rows(tensor).contiguous().numpy().tobytes()


def save_steps(directory, steps, world=LONE, **options):
    """Checkpoints whose step is their seed; best.pt goes along."""
    best = Path(f"{directory}_best.pt")
    if world.is_main:
        best.parent.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(directory, world, asynchronous=False, **options)
    for step in steps:
        if world.is_main:
            best.unlink(missing_ok=True)
            best.write_bytes(b"best of %d" % step * 20)
        files = {"best.pt": best} if world.is_main else {}
        checkpoints.save(step, state(step, world), {"step": step}, files=files)
    checkpoints.close()
    return directory


def find(directory, world=LONE, num_ranks=1, **options):
    """(step of the newest whole checkpoint, names of tensors that differ from what was saved, what
    was said)."""
    checkpoints = Checkpoints(directory, world, **options)
    with speaking(quiet=True) as said:
        found = checkpoints.latest()
    if found is None:
        checkpoints.close()
        return None, [], said
    tensors = blank(world, found.step, ranks=range(num_ranks))
    checkpoints.load(found, tensors)
    checkpoints.close()
    assert found.record == {"step": found.step}
    return found.step, differing(tensors, found.step, world, ranks=range(num_ranks)), said


def tree(directory):
    """Every path below, with the content of files."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
    }


def folders(directory):
    return sorted(path.name for path in directory.iterdir())


def names(*steps):
    return [f"step_{step:010d}" for step in steps]


@functools.cache
def _made(base, world_size):
    if world_size == 0:
        return save_steps(Path(base) / "made0", (10, 20))
    run_ranks(world_size, _save_steps_rank, Path(base) / f"made{world_size}", (10, 20))
    return Path(base) / f"made{world_size}"


@pytest.fixture
def two(tmp_path_factory, tmp_path):
    """Makes a copy of two checkpoints, of steps 10 and 20, saved on so many ranks (0: without a
    process group)."""
    base = tmp_path_factory.getbasetemp()

    def copy(world_size=0, name="checkpoints"):
        shutil.copytree(_made(base, world_size), tmp_path / name)
        return tmp_path / name

    return copy


def _save_steps_rank(rank, directory, steps, options=None):
    save_steps(directory, steps, distributed.current_world("cpu"), **(options or {}))


def _find_rank(rank, directories, num_ranks):
    world = distributed.current_world("cpu")
    outcomes = []
    for directory in directories:
        try:
            outcomes.append(find(directory, world, num_ranks))
        except InputError as error:
            outcomes.append((None, [], [str(error)]))
    return outcomes


# ---- what is saved is what is loaded

SIZES = (10, 3)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "world_sizes", [(1, 3), pytest.param((1, 2, 3, 4), marks=pytest.mark.slow)]
)
def test_every_bit_comes_back_on_any_number_of_ranks(tmp_path, world_sizes):
    """Saved at W, loaded at W': shards are cut anew; also those that are empty, and without any
    process group."""
    for world_size in world_sizes:
        run_ranks(world_size, _save_sizes, tmp_path)
    _save_sizes(None, tmp_path)
    for world_size in world_sizes:
        assert run_ranks(world_size, _load_sizes, tmp_path, (0, *world_sizes)) == [[]] * world_size
    assert _load_sizes(None, tmp_path, (0, *world_sizes)) == []


def _save_sizes(rank, folder):
    world = LONE if rank is None else distributed.current_world("cpu")
    for num_samples in SIZES:
        place = folder / f"{0 if rank is None else world.world_size}_{num_samples}"
        checkpoints = Checkpoints(place, world, asynchronous=num_samples == 3)
        record = {"n": num_samples} if world.is_main else {}
        checkpoints.save(5, state(5, world, num_samples), record)
        checkpoints.close()


def _load_sizes(rank, folder, saved_by_each):
    world = LONE if rank is None else distributed.current_world("cpu")
    wrong = []
    for saved_by, num_samples in itertools.product(saved_by_each, SIZES):
        checkpoints = Checkpoints(folder / f"{saved_by}_{num_samples}", world)
        found = checkpoints.latest()
        assert found.record == {"n": num_samples}
        ranks = range(max(1, saved_by))
        tensors = blank(world, 5, num_samples, ranks)
        described = checkpoints.describe(found)
        assert described.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert (described[name].shape, described[name].dtype) == (tensor.shape, tensor.dtype)
            assert described[name].is_meta
        before = [own_rows(tensor).data_ptr() for tensor in tensors.values()]
        checkpoints.load(found, tensors)
        after = [own_rows(tensor).data_ptr() for tensor in tensors.values()]
        assert before == after, "not in place"
        assert tensors["image"].is_contiguous(memory_format=torch.channels_last)
        differ = differing(tensors, 5, world, num_samples, ranks)
        wrong += [(saved_by, num_samples, name) for name in differ]
        checkpoints.close()
    return wrong


def test_replicated_tensors_are_written_once_and_shards_by_their_owners(two):
    newest = two(3) / names(20)[0]
    with (newest / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    places = {}
    for index, info in metadata.storage_data.items():
        places.setdefault(index.fqn, []).append(info.relative_path)
    for name in REPLICATED:
        assert len(places[name]) == 1, name
    for name in SHARDED:
        owners = sorted(path.split("_")[2] for path in places[name])
        assert owners == ["0", "1", "2"], (name, places[name])


@pytest.mark.distributed
def test_what_is_not_there_is_refused_on_every_rank(two):
    """torch itself would cast another dtype without a word."""
    directory = two()
    for outcomes in [_refused(LONE, directory), *run_ranks(3, _refused_rank, directory)]:
        assert outcomes.pop("afterwards") == []
        for (_, name), (error, text) in outcomes.items():
            assert error == "InputError", (name, error, text)
            assert repr(name) in text
            assert "resume with the config" in text
        said = outcomes["dtype", "weight"][1]
        assert "torch.float32 (3, 4, 5), not torch.float64 (3, 4, 5)" in said


def _refused_rank(rank, directory):
    return _refused(distributed.current_world("cpu"), directory)


def _refused(world, directory):
    checkpoints = Checkpoints(directory, world)
    found = checkpoints.latest()
    tensors = share(whole(1), world)
    outcomes = {}
    first, end = shard_bounds(N, world.world_size, world.rank)
    halves = as_shard(torch.zeros(end - first, 3, dtype=torch.float16), N, world)
    longer_N = torch.zeros(end - first + 1, dtype=torch.int64)
    before = [bits_of(tensor) for tensor in tensors.values()]
    for kind, name, other in (
        ("missing", "other", torch.zeros(3)),
        ("shape", "weight", torch.zeros(3, 4, 6)),
        ("transposed", "weight", torch.zeros(4, 3, 5)),
        ("dtype", "weight", torch.zeros(3, 4, 5, dtype=torch.float64)),
        ("dtype", "logp", halves),
        ("size", "label", as_shard(longer_N, N + world.world_size, world)),
        ("one rank", "other", torch.zeros(3) if world.rank == world.world_size - 1 else None),
    ):
        wanted = tensors if other is None else tensors | {name: other}
        outcomes[kind, name] = catch(checkpoints.load, found, wanted)
        after = [bits_of(tensor) for tensor in tensors.values()]
        assert after == before, "nothing is read before all is checked"
    checkpoints.load(found, tensors)
    outcomes["afterwards"] = differing(tensors, 20, world)
    checkpoints.close()
    return outcomes


# ---- damage

NEWEST = names(20)[0]
DATA, META, BEST, RECORD = "__0_0.distcp", ".metadata", "best.pt", "checkpoint.json"


def flip(path, position):
    """Flip one bit of the byte at a position (a fraction of the file, or a byte)."""
    content = bytearray(path.read_bytes())
    at = int(position * (len(content) - 1)) if isinstance(position, float) else position
    content[at] ^= 1 << (at % 8)
    replace(path, content)


def replace(path, content):
    """Other bytes under the same name, or none; a linked file has another name elsewhere."""
    path.unlink()
    if content is not None:
        path.write_bytes(content)


def edit(change, is_sealed=False):
    """checkpoint.json with something changed, and with a hash that fits where that is asked for."""

    def changed(data):
        content = json.loads(data)
        change(content)
        if is_sealed:
            del content["sha256"]
            content["sha256"] = checkpoint._digest(content)
        return json.dumps(content).encode()

    return changed


DAMAGE = [  # (file, its content afterwards, words of the message)
    (DATA, lambda data: data[:-1], DATA),
    (DATA, lambda data: data[:3000], DATA),
    (DATA, lambda data: b"", DATA),
    (DATA, lambda data: data + b"x", DATA),
    (DATA, "of another step", DATA),
    (DATA, None, DATA),
    (DATA, "folder", DATA),
    (META, None, META),
    (META, lambda data: data[:-5], META),
    (BEST, None, BEST),
    (BEST, lambda data: b"be", BEST),
    (RECORD, None, RECORD),
    (RECORD, lambda data: b"", RECORD),
    (RECORD, lambda data: data[:-1], RECORD),
    (RECORD, lambda data: os.urandom(300), RECORD),
    (RECORD, lambda data: b"[1, 2]", RECORD),
    (RECORD, "of another step", RECORD),
    (RECORD, edit(lambda content: content["record"].update(step=19)), RECORD),
    (RECORD, edit(lambda content: content["files"][BEST].update(sha256="0" * 64)), RECORD),
    (RECORD, edit(lambda content: content["files"].pop(DATA)), RECORD),
    (RECORD, edit(lambda content: content["files"].pop(META), True), META),
    (RECORD, edit(lambda content: content.update(format="format-9"), True), "format-9"),
]


@pytest.mark.parametrize(("file", "change", "words"), DAMAGE, ids=range(len(DAMAGE)))
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(two, file, change, words):
    directory = two()
    path = directory / NEWEST / file

    def damage():
        if change == "folder":
            replace(path, None)
            path.mkdir()
        elif change == "of another step":
            shutil.copy(directory / names(10)[0] / file, path)
        else:
            replace(path, change and change(path.read_bytes()))

    damage()
    damaged = tree(directory / NEWEST)
    step, wrong, said = find(directory)
    assert (step, wrong) == (10, [])
    assert len(said) == 1, said
    assert said[0].startswith(f"checkpoint {NEWEST}: ")
    assert said[0].endswith("; the one before it is used")
    assert words in said[0]
    assert folders(directory) == [*names(10), f"{NEWEST}.damaged"]
    assert tree(directory / f"{NEWEST}.damaged") == damaged, "nothing is deleted"
    assert find(directory) == (10, [], [])
    save_steps(directory, (20,))
    assert find(directory) == (20, [], [])
    assert tree(directory / f"{NEWEST}.damaged") == damaged
    damage()
    assert find(directory)[0] == 10
    assert folders(directory) == [*names(10), f"{NEWEST}.damaged", f"{NEWEST}.damaged1"]


@pytest.mark.parametrize("file", [DATA, META, RECORD, BEST])
def test_one_flipped_bit_is_found_wherever_it_is(two, file):
    """torch.distributed.checkpoint would load it."""
    directory = two()
    path = directory / NEWEST / file
    whole_file = path.read_bytes()
    checkpoints = Checkpoints(directory)
    size = len(whole_file)
    for position in sorted({0, 1, size - 2, size - 1, *range(0, size, max(1, size // 97))}):
        flip(path, position)
        found, problem = checkpoints._examine(directory / NEWEST)
        assert found is None, position
        assert file in problem or problem.startswith("format "), (position, problem)
        path.write_bytes(whole_file)
    assert find(directory) == (20, [], [])


def test_a_folder_with_the_name_of_another_step_is_damaged(two):
    directory = two()
    (directory / NEWEST).rename(directory / names(30)[0])
    step, wrong, said = find(directory)
    assert (step, wrong) == (10, [])
    assert names(30)[0] in said[0]
    assert "checkpoint.json" in said[0]
    assert folders(directory) == [*names(10), f"{names(30)[0]}.damaged"]


@pytest.mark.distributed
def test_every_rank_looks_at_its_share_of_the_files_and_all_hear_of_it(two):
    """Damage of any single file, saved on 3 ranks; and when all checkpoints are damaged all are
    named, and nothing changes."""
    directory = two(3)
    files = folders(directory / NEWEST)
    data = [f"__{rank}_0.distcp" for rank in range(3)]
    assert files == [".metadata", *data, "best.pt", "checkpoint.json"]
    copies = []
    for number, file in enumerate(files):
        copies.append(two(3, f"copy{number}"))
        path = copies[-1] / NEWEST / file
        flip(path, 0.6) if number % 2 else path.unlink()
    flip(directory / names(10)[0] / "__2_0.distcp", 0.3)
    (directory / NEWEST / RECORD).unlink()
    before = tree(directory)
    for rank, outcomes in enumerate(run_ranks(2, _find_rank, [*copies, directory], 3)):
        for file, (step, wrong, said) in zip(files, outcomes, strict=False):
            assert (step, wrong) == (10, []), file
            assert len(said) == (rank == 0)
            assert all(f"{NEWEST}: {file}" in text for text in said)
        for part in (
            f"none of the 2 checkpoints in {directory} can be used",
            f"{names(10)[0]}: __2_0.distcp is damaged",
            f"{NEWEST}: checkpoint.json is missing",
            "--fresh --force",
        ):
            assert part in outcomes[-1][2][0]
    for copy in copies:
        assert folders(copy) == [*names(10), f"{NEWEST}.damaged"]
    assert tree(directory) == before


def test_a_checkpoint_that_the_caller_refuses_is_passed_over(two, caplog):
    directory = two()
    asked = []

    def refuse(found):
        asked.append((found.step, found.record))
        return "its trajectory is gone" if found.step == 20 else ""

    found = Checkpoints(directory, LONE).latest(refuse)
    assert found == Checkpoint(directory / names(10)[0], 10, {"step": 10})
    assert asked == [(20, {"step": 20}), (10, {"step": 10})]
    assert caplog.messages == [
        f"checkpoint {NEWEST}: its trajectory is gone; the one before it is used"
    ]
    directory = two(name="again")
    before = tree(directory)
    none = r"none of the 2 checkpoints .*step_0000000020: no; step_0000000010: no"
    with pytest.raises(InputError, match=none):
        Checkpoints(directory).latest(lambda found: "no")
    assert tree(directory) == before


# ---- which one, and how many


def test_order_is_that_of_steps_not_of_clocks_or_names(tmp_path):
    steps = (9_999_999_999, 10_000_000_000, 3, 200)
    save_steps(tmp_path / "c", steps, keep=9)
    for age, step in enumerate(sorted(steps)):
        for path in [*(tmp_path / "c" / names(step)[0]).iterdir(), tmp_path / "c" / names(step)[0]]:
            os.utime(path, (1000 - age, 1000 - age))
    assert find(tmp_path / "c")[0] == 10_000_000_000
    shutil.rmtree(tmp_path / "c" / names(10_000_000_000)[0])
    assert find(tmp_path / "c")[0] == 9_999_999_999


def test_unfinished_folders_are_not_seen_and_swept_at_the_next_save(two):
    directory = two()
    shutil.copytree(directory / NEWEST, directory / f".unfinished_{names(40)[0]}")
    shutil.copytree(directory / NEWEST, directory / f".unfinished_removal_of_{names(10)[0]}")
    (directory / "notes.txt").write_text("of the user")
    assert find(directory) == (20, [], [])
    save_steps(directory, (40,), keep=5)
    assert folders(directory) == ["notes.txt", *names(10, 20, 40)]
    assert find(directory) == (40, [], [])


def test_nothing_there_is_no_checkpoint(tmp_path):
    assert Checkpoints(tmp_path / "none").latest() is None
    (tmp_path / "some" / ".unfinished_step_0000000001").mkdir(parents=True)
    (tmp_path / "some" / "step_0000000001.damaged").mkdir()
    assert Checkpoints(tmp_path / "some").latest() is None


def test_exactly_the_newest_are_kept(tmp_path):
    directory, steps = tmp_path / "c", (1, 2, 5, 7, 30)
    checkpoints = Checkpoints(directory, keep=3)
    for number, step in enumerate(steps, 1):
        checkpoints.save(step, state(step, LONE), {"step": step}, wait=True)
        assert folders(directory) == names(*steps[max(0, number - 3) : number])
    checkpoints.close()
    checkpoints.remove_all()
    assert not directory.exists()
    with pytest.raises(InputError, match=r"keep=1 must be at least 2"):
        Checkpoints(tmp_path, LONE, keep=1)


def test_a_step_that_is_saved_is_not_saved_again(two):
    directory = two()
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    checkpoints = Checkpoints(directory)
    assert checkpoints.latest().step == 20
    checkpoints.save(20, state(77, LONE), {"step": 20}, wait=True)
    checkpoints.save(20, state(77, LONE), {"step": 20})
    checkpoints.close()
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == before
    assert find(directory) == (20, [], [])


def test_a_save_replaces_a_folder_of_its_step_from_an_abandoned_branch(two):
    directory = two()
    checkpoints = Checkpoints(directory)
    assert checkpoints.latest(lambda found: "" if found.step == 10 else "no").step == 10
    (directory / f"{NEWEST}.abandoned").rename(directory / NEWEST)
    (directory / NEWEST / "left.txt").write_text("of the abandoned branch")
    checkpoints.save(20, state(21, LONE), {"step": 20}, wait=True)
    checkpoints.close()
    assert folders(directory) == names(10, 20)
    assert not (directory / NEWEST / "left.txt").exists()
    tensors = blank(LONE)
    found = Checkpoints(directory).latest()
    Checkpoints(directory).load(found, tensors)
    assert differing(tensors, 21, LONE) == []


def test_files_that_go_along_do_not_change_with_the_original(tmp_path, monkeypatch):
    """The original is replaced, as everything here is; where a link cannot be made it is copied."""
    directory, best = tmp_path / "c", tmp_path / "best.pt"
    checkpoints = Checkpoints(directory, asynchronous=False)
    best.write_bytes(b"first")
    checkpoints.save(1, state(1, LONE), {"step": 1}, files={"best.pt": best})
    assert (directory / names(1)[0] / "best.pt").stat().st_ino == best.stat().st_ino
    (tmp_path / "new").write_bytes(b"second")
    (tmp_path / "new").replace(best)

    def no_links(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_links)
    checkpoints.save(2, state(2, LONE), {"step": 2}, files={"best.pt": best})
    assert (directory / names(1)[0] / "best.pt").read_bytes() == b"first"
    assert (directory / names(2)[0] / "best.pt").read_bytes() == b"second"
    assert (directory / names(2)[0] / "best.pt").stat().st_ino != best.stat().st_ino
    assert find(directory) == (2, [], [])


# ---- killed at every point of a save


def _die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def _at_publication(path, target):
    if target.name == names(30)[0]:
        _die()


def _half_removed(path, *_, **__):
    next(path.glob("*.distcp")).unlink()
    _die()


def _at_the_verdict(*_):
    if next(_gathers) == 4:  # guard, folder, outcomes; then the verdict
        _die()


_gathers = itertools.count(1)


WRITER = dcp.FileSystemWriter
# what is called there, whether it dies before or after, and the steps that may be the newest then
POINTS = {
    "before the data": (WRITER, "write_data", "before", _die, {20}),
    "at the first sync of data": (os, "fsync", "before", _die, {20}),
    "after the data": (WRITER, "write_data", "after", _die, {20}),
    "hashing": (checkpoint, "_describe", "before", _die, {20}),
    "before .metadata": (WRITER, "finish", "before", _die, {20}),
    "at the rename of .metadata": (FileSystem, "rename", "before", _die, {20}),
    "after .metadata": (WRITER, "finish", "after", _die, {20}),
    "before checkpoint.json": (checkpoint, "write_atomically", "before", _die, {20}),
    "after checkpoint.json": (checkpoint, "write_atomically", "after", _die, {20}),
    "before the rename": (Path, "rename", "before", _at_publication, {20}),
    "after the rename": (Path, "rename", "after", _at_publication, {30}),
    "after the sync of the folder": (checkpoint, "sync_folder", "after", _die, {30}),
    "retired": (checkpoint, "_retire", "after", _die, {30}),
    "in the removal": (shutil, "rmtree", "before", _half_removed, {30}),
    # another rank than the first
    "told": (collectives, "gather_objects", "before", _at_the_verdict, {20, 30}),
    "at the end": (collectives, "gather_objects", "after", _at_the_verdict, {30}),
}
OF_ALL, OF_THE_FIRST, OF_OTHERS = list(POINTS)[:4], list(POINTS)[:14], list(POINTS)[14:]


def _around(owner, name, before=None, after=None):
    """Act before or after the real function."""
    real = getattr(owner, name)

    def wrapped(*args, **kwargs):
        if before:
            before(*args)
        result = real(*args, **kwargs)
        if after:
            after(*args)
        return result

    setattr(owner, name, wrapped)


def _killed_rank(rank, directory, point, victim, asynchronous):
    world = distributed.current_world("cpu")
    checkpoints = Checkpoints(directory, world, asynchronous=asynchronous)
    assert checkpoints.latest().step == 20
    if rank == victim:
        owner, name, when, die, _ = POINTS[point]
        _around(owner, name, **{when: die})
    checkpoints.save(30, state(30, world), {"step": 30})
    checkpoints.finish()


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("point", "victim", "world_size", "asynchronous"),
    [
        *((point, 0, 1, False) for point in OF_THE_FIRST),
        ("before the data", 1, 2, True),
        ("told", 1, 2, True),
        *(pytest.param(point, 0, 2, True, marks=pytest.mark.slow) for point in OF_THE_FIRST),
        *(
            pytest.param(point, 1, 2, number % 2 == 0, marks=pytest.mark.slow)
            for number, point in enumerate(OF_ALL + OF_OTHERS)
        ),
    ],
)
def test_killed_while_saving_there_is_a_whole_checkpoint(
    two, point, victim, world_size, asynchronous
):
    directory = two(world_size)
    case = (directory, point, victim, asynchronous)
    codes = exit_codes(world_size, _killed_rank, *case, patience=0.5)
    assert codes[victim] == -signal.SIGKILL, codes
    listed = folders(directory)
    step, wrong, said = find(directory, num_ranks=1)
    assert step in POINTS[point][-1], (step, listed)
    assert (wrong, said) == ([], []), "whole, and nothing had to be set aside"
    save_steps(directory, (40,))
    assert folders(directory) == names(step, 40), listed
    assert find(directory)[:2] == (40, [])


# ---- a disk that is full


def _limit_files(num_bytes):
    """Writes beyond so many bytes of a file fail, as they do on a full disk; None lifts it."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if num_bytes is None else num_bytes, hard))


def _large(seed, world, num_samples=60_000):
    first, end = shard_bounds(num_samples, world.world_size, world.rank)
    table = torch.arange(num_samples, dtype=torch.float64) + seed
    return {"table": as_shard(table[first:end].clone(), num_samples, world)}


def _full_disk_rank(rank, folder, ranks, wait, stop):
    world = distributed.current_world("cpu")
    directory = folder / f"{wait} {stop}"
    checkpoints = Checkpoints(directory, world, stop_on_error=stop, timeout_seconds=30)
    checkpoints.save(10, _large(10, world), {}, wait=True)
    if rank in ranks:
        _limit_files(64 << 10)
    with speaking(quiet=True) as said:
        outcomes = [catch(lambda: checkpoints.save(20, _large(20, world), {}, wait=wait))]
        if not wait:
            outcomes.append(catch(checkpoints.finish))
    _limit_files(None)
    collectives.barrier()
    assert folders(directory) == names(10), "nothing half written stays"
    collectives.barrier()
    checkpoints.save(30, _large(30, world), {}, wait=True)
    found = checkpoints.latest()
    tensors = _large(0, world)
    checkpoints.load(found, tensors)
    assert found.step == 30
    assert bits_of(tensors["table"]) == bits_of(_large(30, world)["table"])
    assert checkpoints.num_failed == 1
    checkpoints.close()
    return outcomes, said


def _full_disk_ranks(rank, folder, ranks):
    return {
        (wait, stop): _full_disk_rank(rank, folder, ranks, wait, stop)
        for wait in (False, True)
        for stop in (False, True)
    }


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world_size", "ranks"),
    [
        (2, [1]),
        *(pytest.param(W, [0], marks=pytest.mark.slow) for W in (1, 3)),
        pytest.param(3, [0, 1, 2], marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_costs_one_checkpoint_and_no_more(tmp_path, world_size, ranks):
    for rank, found in enumerate(run_ranks(world_size, _full_disk_ranks, tmp_path, ranks)):
        for (wait, stop), (outcomes, said) in found.items():
            if stop:
                errors = [error for error, _ in outcomes]
                assert errors == (["InputError"] if wait else ["", "InputError"])
                assert said == []
                assert "checkpoint at step 20 failed (rank" in outcomes[-1][1]
                assert "disk is full" in outcomes[-1][1]
            else:
                assert all(outcome == ("", "") for outcome in outcomes)
                assert len(said) == (rank == 0)
                for text in said:
                    assert "checkpoint at step 20 failed (rank" in text
                    assert "the run goes on" in text


def _cannot_publish_ranks(rank, folder):
    return [
        _cannot_publish_rank(rank, folder / f"{name} {wait}", name, wait)
        for name in ("write_atomically", "rename", "mkdir", "_describe")
        for wait in (False, True)
    ]


def _cannot_publish_rank(rank, directory, name, wait):
    world = distributed.current_world("cpu")

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    owner = Path if name in ("rename", "mkdir") else checkpoint
    where = 1 if name == "_describe" else 0
    checkpoints = Checkpoints(directory, world)
    checkpoints.save(10, state(10, world), {"step": 10}, wait=True)
    real = getattr(owner, name)
    if rank == where:
        setattr(owner, name, fail)
    with speaking(quiet=True) as said:
        checkpoints.save(20, state(20, world), {"step": 20}, wait=wait)
        checkpoints.finish()
    setattr(owner, name, real)
    collectives.barrier()
    left = folders(directory)
    collectives.barrier()
    checkpoints.save(20, state(20, world), {"step": 20}, wait=wait)
    checkpoints.close()
    return checkpoints.num_failed, left, find(directory, world, 2)[:2], said


@pytest.mark.distributed
def test_what_fails_beside_the_tensors_fails_for_all(tmp_path):
    for rank, outcomes in enumerate(run_ranks(2, _cannot_publish_ranks, tmp_path)):
        for num_failed, left, found, said in outcomes:
            assert (num_failed, left, found) == (1, names(10), (20, []))
            assert len(said) == (rank == 0)
            assert all("No space left on device" in text for text in said)


# ---- in the background


def _changed_rank(rank, directory):
    world = distributed.current_world("cpu")
    checkpoints = Checkpoints(directory, world)
    _around(dcp.FileSystemWriter, "write_data", before=lambda *_: time.sleep(0.2))
    for step in (1, 2, 3):
        tensors = state(step, world)
        checkpoints.save(step, tensors, {"step": step})
        for tensor in tensors.values():
            own_rows(tensor).zero_()
    was_under_way = checkpoints._thread.is_alive()
    checkpoints.close()
    return find(directory, world, world.world_size), was_under_way


@pytest.mark.distributed
def test_the_state_may_change_as_soon_as_save_returns(tmp_path):
    for found, was_under_way in run_ranks(3, _changed_rank, tmp_path / "ranks"):
        assert found == (3, [], [])
        assert was_under_way
    checkpoints = Checkpoints(tmp_path / "alone")
    tensors = state(4, LONE)
    checkpoints.save(4, tensors, {"step": 4})
    for tensor in tensors.values():
        tensor.zero_()
    checkpoints.close()
    assert find(tmp_path / "alone") == (4, [], [])
    seconds = [1.0]
    checkpoints.save(5, tensors, {"history": {"seconds": seconds}})
    seconds.append(2.0)
    checkpoints.close()
    assert checkpoints.latest().record == {"history": {"seconds": [1.0]}}


def _guarded_rank(rank, directory):
    world = distributed.current_world("cpu")
    asked = []

    def guard():
        asked.append(rank)
        if len(asked) == 2:
            raise InputError("taken over by another job")

    checkpoints = Checkpoints(directory, world, guard=guard)
    checkpoints.save(1, state(1, world), {"step": 1})
    outcome = catch(lambda: checkpoints.save(2, state(2, world), {"step": 2}))
    collectives.barrier()
    return outcome, len(asked), folders(directory)


@pytest.mark.distributed
def test_a_guard_stops_all_ranks_before_anything_is_touched(tmp_path):
    """Also when a failed save would not: it is no failed save."""
    for rank, ((error, text), num_asked, left) in enumerate(run_ranks(2, _guarded_rank, tmp_path)):
        assert error == "InputError"
        assert "taken over by another job" in text
        assert num_asked == (2 if rank == 0 else 0)
        assert left == names(1)


def _defect_rank(rank, directory):
    world = distributed.current_world("cpu")
    checkpoints = Checkpoints(directory, world)

    def broken(*_, **__):
        raise ZeroDivisionError("a defect")

    checkpoint._describe = broken
    checkpoints.save(1, state(1, world), {})
    return catch(checkpoints.finish)


@pytest.mark.distributed
def test_a_defect_in_the_background_is_raised_where_somebody_looks(tmp_path):
    assert run_ranks(1, _defect_rank, tmp_path) == [("ZeroDivisionError", "a defect")]


# ---- nothing in a checkpoint is executed


class Call:
    """Pickles as a call of something."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def named(module, name, *arguments):
    """A pickle that looks up `name` in `module`, dots included, and calls it."""
    text = b"".join(
        b"\x8c" + bytes([len(part)]) + part for part in (module.encode(), name.encode())
    )
    inner = pickle.dumps(arguments, protocol=4)[2:-1]
    return b"\x80\x04" + text + b"\x93" + inner[9:] + b"R."


def seal(folder):
    """Make checkpoint.json fit to the files, as somebody would who wants them loaded."""
    path = folder / "checkpoint.json"
    content = json.loads(path.read_text())
    del content["sha256"]
    content["files"] = {
        file.name: checkpoint._describe(file) for file in folder.iterdir() if file.name != path.name
    }
    path.write_text(json.dumps(content | {"sha256": checkpoint._digest(content)}))


def hostile_pickles(mark):
    command = f"touch {mark}"
    touch = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    return {
        "system": pickle.dumps(Call(os.system, command)),
        "protocol_0": pickle.dumps(Call(os.system, command), protocol=0),
        "instance": b"(S'%s'\nios\nsystem\n." % command.encode(),
        "eval": pickle.dumps(Call(eval, touch)),
        "exec": pickle.dumps(Call(exec, touch)),
        "getattr": named("builtins", "getattr", "a", "upper"),
        "import": named("builtins", "__import__", "os"),
        "partial": pickle.dumps(Call(functools.partial, eval, touch)),
        "dotted_metadata": named("torch.distributed.checkpoint.metadata", "os.system", command),
        "dotted_storage": named("torch.distributed.checkpoint.filesystem", "os.system", command),
        "dotted_size": named("torch", "os.system", command),
        "dotted_path": named("pathlib", "PosixPath.touch", Path(mark)),
        "dotted_layout": named("torch.serialization", "os.system", command),
        "torch_load": named("torch", "load", str(mark)),
        "torch_save": named("torch", "save", 1, str(mark)),
        "path_module": named("pathlib", "os.system", command),
        "bytes_entry": pickle.dumps(dcp.metadata.BytesStorageMetadata()),
        "persistent": b"\x80\x04\x8c\x01aQ.",
    }


def refused(directory, *wanted):
    """What loading a sealed checkpoint says; it must be an InputError each time."""
    seal(directory / NEWEST)
    checkpoints = Checkpoints(directory)
    found = checkpoints.latest()
    assert found.step == 20, "its hashes fit"
    outcomes = [catch(checkpoints.load, found, tensors) for tensors in wanted or [blank(LONE)]]
    assert {error for error, _ in outcomes} == {"InputError"}, outcomes
    return outcomes[0][1]


@pytest.mark.parametrize("kind", list(hostile_pickles(Path("x"))))
def test_a_hostile_metadata_is_refused_before_it_runs(two, tmp_path, kind):
    """All but five would run in pickle.loads."""
    directory, mark = two(), tmp_path / "mark"
    content = hostile_pickles(mark)[kind]
    (directory / NEWEST / META).write_bytes(content)
    assert "was not written by tdds" in refused(directory)
    checkpoints = Checkpoints(directory)
    assert catch(checkpoints.describe, checkpoints.latest())[0] == "InputError"
    assert not mark.exists()
    if kind not in ("persistent", "torch_load", "getattr", "import", "bytes_entry"):
        found = pickle.loads(content)
        if kind == "partial":
            found()
        assert mark.exists()


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"\x80\x04", b"garbage"),
        *map(pickle.dumps, ([1, 2], 7, None, {"a": 1})),
        *(pickle.dumps(dcp.metadata.Metadata(tensors)) for tensors in (None, {"weight": 3})),
    ],
)
def test_a_metadata_that_is_none_is_an_input_error(two, content):
    directory = two()
    (directory / NEWEST / META).write_bytes(content)
    refused(directory)


def save_as_torch_does(folder, tensors):
    """A checkpoint of torch's own in one of our folders."""
    record = (folder / RECORD).read_text()
    shutil.rmtree(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(tensors, checkpoint_id=folder, no_dist=True)
    (folder / RECORD).write_text(record)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_is_not_a_tensor_is_not_unpickled(two, tmp_path):
    directory, mark = two(), tmp_path / "mark"
    folder = directory / NEWEST
    save_as_torch_does(
        folder, {"weight": torch.zeros(3, 4, 5), "extra": Call(os.system, f"touch {mark}")}
    )
    refused(directory, {"weight": torch.zeros(3, 4, 5)}, {"extra": torch.zeros(3)})
    assert not mark.exists()
    dcp.load({"weight": torch.zeros(3, 4, 5), "extra": None}, checkpoint_id=folder, no_dist=True)
    assert mark.exists(), "torch runs it"


def test_the_planner_does_not_unpickle_either(two, tmp_path, monkeypatch):
    """Should BytesStorageMetadata ever be let in."""
    directory, mark = two(), tmp_path / "mark"
    save_as_torch_does(directory / NEWEST, {"extra": Call(os.system, f"touch {mark}")})
    module = "torch.distributed.checkpoint.metadata"
    names = (*checkpoint._IN_METADATA[module], "BytesStorageMetadata")
    monkeypatch.setitem(checkpoint._IN_METADATA, module, names)
    described = {"extra": torch.zeros(3, device="meta")}
    monkeypatch.setattr(Checkpoints, "describe", lambda *_: described)
    refused(directory, {"extra": torch.zeros(3)})
    assert not mark.exists()


def test_a_hostile_tensor_is_refused(two, tmp_path):
    """The data of a tensor is read by torch.load, which must not unpickle objects."""
    directory, mark = two(), tmp_path / "mark"
    folder = directory / NEWEST
    metadata = pickle.loads((folder / META).read_bytes())
    hostile = io.BytesIO()
    torch.save(Call(os.system, f"touch {mark}"), hostile)
    (folder / DATA).write_bytes(hostile.getvalue())
    for info in metadata.storage_data.values():
        info.offset, info.length = 0, len(hostile.getvalue())
    (folder / META).write_bytes(pickle.dumps(metadata))
    refused(directory, {"weight": torch.zeros(3, 4, 5)})
    assert not mark.exists()


def test_a_thread_that_does_not_begin_is_no_saved_checkpoint(tmp_path, monkeypatch):
    """As where choosing the device fails."""
    monkeypatch.setattr(host_memory.DeviceThread, "run", lambda self: None)
    checkpoints = Checkpoints(tmp_path, LONE)
    checkpoints.save(1, {"x": torch.zeros(2)}, {})
    with pytest.raises(RuntimeError, match="the thread of checkpoint 1 did not begin"):
        checkpoints.finish()
