"""Checkpoints: what is loaded is bitwise what was saved, on any number of ranks; what is damaged, half written or hostile is
not loaded, and a run that dies at any moment of a save has a whole checkpoint left."""

import ctypes
import errno
import functools
import io
import json
import os
import pickle
import resource
import shutil
import signal
import socket
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import catch, exit_codes, run_ranks

from tdds_dist import checkpoint, distributed
from tdds_dist.checkpoint import Checkpoint, Checkpoints
from tdds_dist.distributed import World, as_shard, own_rows
from tdds_dist.errors import InputError
from tdds_dist.partition import shard_bounds

LONE = World(0, 0, 1, 1, torch.device("cpu"))
N = 10
REPLICATED = ("weight", "half", "image", "count", "mask", "bytes", "empty")
SHARDED = {"logp": 0, "label": 0, "visits": 0, "rough": 1, "flags": 0}  # name: sample axis


def whole(seed, num_samples=N):
    """Every tensor as it is in all, filled from `seed`; the bits are arbitrary where that is possible."""
    generator = torch.Generator().manual_seed(seed)

    def bits(dtype, *shape):
        size = torch.empty(0, dtype=dtype).element_size()
        return torch.randint(256, (*shape[:-1], shape[-1] * size), generator=generator, dtype=torch.uint8).view(dtype)

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
    return {f"rank{rank:05d}/random": torch.randint(256, (5 + rank,), generator=generator, dtype=torch.uint8)}


def share(tensors, world, num_samples=N):
    """`whole` as this rank holds it."""
    first, end = shard_bounds(num_samples, world.world_size, world.rank)
    mine = {}
    for name, tensor in tensors.items():
        if (dim := SHARDED.get(name)) is None:
            mine[name] = tensor.clone()
        else:
            block = tensor.narrow(dim, first, end - first).clone(memory_format=torch.contiguous_format)
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


def quiet(directory, world=LONE, **options):
    return Checkpoints(directory, world, **({"say": lambda text: None} | options))


def save_steps(directory, steps, world=LONE, **options):
    """Checkpoints whose step is their seed; best.pt goes along."""
    best = Path(f"{directory}_best.pt")
    if world.is_main:
        best.parent.mkdir(parents=True, exist_ok=True)
    checkpoints = quiet(directory, world, asynchronous=False, **options)
    for step in steps:
        if world.is_main:
            best.unlink(missing_ok=True)
            best.write_bytes(b"best of %d" % step * 20)
        checkpoints.save(step, state(step, world), {"step": step}, files={"best.pt": best} if world.is_main else {})
    checkpoints.close()
    return directory


def find(directory, world=LONE, num_ranks=1, **options):
    """(step of the newest whole checkpoint, names of tensors that differ from what was saved, what was said)."""
    said = []
    checkpoints = Checkpoints(directory, world, say=said.append, **options)
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
    return {str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
            for path in sorted(directory.rglob("*"))}


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
    """Makes a copy of two checkpoints, of steps 10 and 20, saved on so many ranks (0: without a process group)."""
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
def test_every_bit_comes_back_on_any_number_of_ranks(tmp_path):
    """Saved at W, loaded at W': shards are cut anew; also those that are empty, and without any process group."""
    for world_size in (1, 2, 3, 4):
        run_ranks(world_size, _save_sizes, tmp_path)
    _save_sizes(None, tmp_path)
    for world_size in (1, 2, 3, 4):
        assert run_ranks(world_size, _load_sizes, tmp_path) == [[]] * world_size
    assert _load_sizes(None, tmp_path) == []


def _save_sizes(rank, folder):
    world = LONE if rank is None else distributed.current_world("cpu")
    for num_samples in SIZES:
        saved_by = 0 if rank is None else world.world_size
        checkpoints = quiet(folder / f"{saved_by}_{num_samples}", world, asynchronous=num_samples == 3)
        checkpoints.save(5, state(5, world, num_samples), {"n": num_samples} if world.is_main else {})
        checkpoints.close()


def _load_sizes(rank, folder):
    world = LONE if rank is None else distributed.current_world("cpu")
    wrong = []
    for saved_by in (0, 1, 2, 3, 4):
        for num_samples in SIZES:
            checkpoints = quiet(folder / f"{saved_by}_{num_samples}", world)
            found = checkpoints.latest()
            assert found.record == {"n": num_samples}
            ranks = range(max(1, saved_by))
            tensors = blank(world, 5, num_samples, ranks)
            described = checkpoints.describe(found)
            assert described.keys() == tensors.keys()
            assert all((described[name].shape, described[name].dtype) == (tensor.shape, tensor.dtype)
                       for name, tensor in tensors.items())
            assert all(tensor.is_meta for tensor in described.values())
            before = {name: own_rows(tensor).data_ptr() for name, tensor in tensors.items()}
            checkpoints.load(found, tensors)
            assert before == {name: own_rows(tensor).data_ptr() for name, tensor in tensors.items()}, "not in place"
            assert tensors["image"].is_contiguous(memory_format=torch.channels_last)
            wrong += [(saved_by, num_samples, name) for name in differing(tensors, 5, world, num_samples, ranks)]
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
        assert sorted(path.split("_")[2] for path in places[name]) == ["0", "1", "2"], (name, places[name])


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_what_is_not_there_is_refused_on_every_rank(two, world_size):
    """torch itself would cast another dtype without a word."""
    directory = two()
    for outcomes in run_ranks(world_size, _refused_rank, directory):
        _check_refusals(outcomes)
    _check_refusals(_refused(LONE, directory))


def _refused_rank(rank, directory):
    return _refused(distributed.current_world("cpu"), directory)


def _refused(world, directory):
    checkpoints = quiet(directory, world)
    found = checkpoints.latest()
    tensors = share(whole(1), world)
    outcomes = {}
    first, end = shard_bounds(N, world.world_size, world.rank)
    for kind, other in {
        "missing": {"other": torch.zeros(3)},
        "shape": {"weight": torch.zeros(3, 4, 6)},
        "transposed": {"weight": torch.zeros(4, 3, 5)},
        "dtype": {"weight": torch.zeros(3, 4, 5, dtype=torch.float64)},
        "dtype of a shard": {"logp": as_shard(torch.zeros(end - first, 3, dtype=torch.float16), N, world)},
        "size of a shard": {"label": as_shard(torch.zeros(end - first + 1, dtype=torch.int64), N + world.world_size, world)},
        "one rank": {"other": torch.zeros(3)} if world.rank == world.world_size - 1 else {},
    }.items():
        before = {name: bits_of(tensor) for name, tensor in tensors.items()}
        outcomes[kind] = catch(checkpoints.load, found, tensors | other)
        assert before == {name: bits_of(tensor) for name, tensor in tensors.items()}, "nothing is read before all is checked"
    tensors = share(whole(1), world)
    checkpoints.load(found, tensors)
    outcomes["afterwards"] = differing(tensors, 20, world)
    checkpoints.close()
    return outcomes


def _check_refusals(outcomes):
    assert outcomes.pop("afterwards") == []
    for kind, (error, text) in outcomes.items():
        assert error == "InputError", (kind, error, text)
        name = {"missing": "other", "one rank": "other", "dtype of a shard": "logp", "size of a shard": "label"}.get(
            kind, "weight")
        assert repr(name) in text
        assert "resume with the config" in text
    assert "torch.float32 (3, 4, 5), not torch.float64 (3, 4, 5)" in outcomes["dtype"][1]


# ---- damage

NEWEST = names(20)[0]


def flip(path, position):
    """Flip one bit of the byte at a position (a fraction of the file, or a byte)."""
    content = bytearray(path.read_bytes())
    at = int(position * (len(content) - 1)) if isinstance(position, float) else position
    content[at] ^= 1 << (at % 8)
    path.unlink()  # a linked file has another name elsewhere
    path.write_bytes(content)


def _edit(directory, change, seal=False):
    path = directory / NEWEST / "checkpoint.json"
    content = json.loads(path.read_text())
    change(content)
    if seal:
        del content["sha256"]
        content["sha256"] = checkpoint._digest(content)
    path.write_text(json.dumps(content))


def _cut(path, num_bytes):
    os.truncate(path, num_bytes if num_bytes >= 0 else path.stat().st_size + num_bytes)


DAMAGE = {
    "data_truncated_by_1": ("__0_0.distcp", lambda d: _cut(d / NEWEST / "__0_0.distcp", -1)),
    "data_truncated_to_half": ("__0_0.distcp", lambda d: _cut(d / NEWEST / "__0_0.distcp", 3000)),
    "data_empty": ("__0_0.distcp", lambda d: _cut(d / NEWEST / "__0_0.distcp", 0)),
    "data_longer": ("__0_0.distcp", lambda d: (d / NEWEST / "__0_0.distcp").open("ab").write(b"x")),
    "data_of_another_step": ("__0_0.distcp", lambda d: shutil.copy(d / names(10)[0] / "__0_0.distcp", d / NEWEST)),
    "data_missing": ("__0_0.distcp", lambda d: (d / NEWEST / "__0_0.distcp").unlink()),
    "data_is_a_folder": ("__0_0.distcp", lambda d: ((d / NEWEST / "__0_0.distcp").unlink(),
                                                   (d / NEWEST / "__0_0.distcp").mkdir())),
    "metadata_missing": (".metadata", lambda d: (d / NEWEST / ".metadata").unlink()),
    "metadata_truncated": (".metadata", lambda d: _cut(d / NEWEST / ".metadata", -5)),
    "best_missing": ("best.pt", lambda d: (d / NEWEST / "best.pt").unlink()),
    "best_truncated": ("best.pt", lambda d: ((d / NEWEST / "best.pt").unlink(), (d / NEWEST / "best.pt").write_bytes(b"be"))),
    "record_missing": ("checkpoint.json", lambda d: (d / NEWEST / "checkpoint.json").unlink()),
    "record_empty": ("checkpoint.json", lambda d: _cut(d / NEWEST / "checkpoint.json", 0)),
    "record_truncated": ("checkpoint.json", lambda d: _cut(d / NEWEST / "checkpoint.json", -1)),
    "record_no_text": ("checkpoint.json", lambda d: (d / NEWEST / "checkpoint.json").write_bytes(os.urandom(300))),
    "record_a_list": ("checkpoint.json", lambda d: (d / NEWEST / "checkpoint.json").write_text("[1, 2]")),
    "record_of_another_step": ("checkpoint.json", lambda d: shutil.copy(d / names(10)[0] / "checkpoint.json", d / NEWEST)),
    "record_edited": ("checkpoint.json", lambda d: _edit(d, lambda content: content["record"].update(step=19))),
    "hash_edited": ("checkpoint.json", lambda d: _edit(d, lambda content: content["files"]["best.pt"].update(sha256="0" * 64))),
    "file_not_listed": ("checkpoint.json", lambda d: _edit(d, lambda content: content["files"].pop("__0_0.distcp"))),
    "format_of_the_future": ("tdds-checkpoint-9", lambda d: _edit(d, lambda content: content.update(format="tdds-checkpoint-9"),
                                                                seal=True)),
    "no_metadata_listed": (".metadata", lambda d: _edit(d, lambda content: content["files"].pop(".metadata"), seal=True)),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(two, kind):
    directory = two()
    file, damage = DAMAGE[kind]
    damage(directory)
    damaged = tree(directory / NEWEST)
    step, wrong, said = find(directory)
    assert (step, wrong) == (10, [])
    assert len(said) == 1, said
    assert said[0].startswith(f"warning: checkpoint {NEWEST}: ")
    assert said[0].endswith("; the one before it is used")
    assert file in said[0]
    assert folders(directory) == [*names(10), f"{NEWEST}.damaged"]
    assert tree(directory / f"{NEWEST}.damaged") == damaged, "nothing is deleted"
    assert find(directory) == (10, [], [])
    save_steps(directory, (20,))
    assert find(directory) == (20, [], [])
    assert tree(directory / f"{NEWEST}.damaged") == damaged
    damage(directory)
    assert find(directory)[0] == 10
    assert folders(directory) == [*names(10), f"{NEWEST}.damaged", f"{NEWEST}.damaged1"]


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "checkpoint.json", "best.pt"])
def test_one_flipped_bit_is_found_wherever_it_is(two, file):
    """torch.distributed.checkpoint would load it."""
    directory = two()
    path = directory / NEWEST / file
    whole_file = path.read_bytes()
    checkpoints = quiet(directory)
    size = len(whole_file)
    for position in sorted({0, 1, size - 2, size - 1, *range(0, size, max(1, size // 97))}):
        flip(path, position)
        found, problem = checkpoints._examine(directory / NEWEST)
        assert found is None, position
        assert file in problem or problem.startswith("format "), (position, problem)
        path.write_bytes(whole_file)
    assert find(directory) == (20, [], [])
    flip(path, 0.5)
    step, wrong, said = find(directory)
    assert (step, wrong, len(said)) == (10, [], 1)
    assert f"{NEWEST}: {file}" in said[0]


def test_a_folder_with_the_name_of_another_step_is_damaged(two):
    directory = two()
    (directory / NEWEST).rename(directory / names(30)[0])
    step, wrong, said = find(directory)
    assert (step, wrong) == (10, [])
    assert names(30)[0] in said[0]
    assert "checkpoint.json" in said[0]
    assert folders(directory) == [*names(10), f"{names(30)[0]}.damaged"]


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 3])
def test_every_rank_looks_at_its_share_of_the_files_and_all_hear_of_it(two, world_size):
    """Damage of any single file, saved on 3 ranks."""
    directory = two(3)
    files = sorted(path.name for path in (directory / NEWEST).iterdir())
    assert files == [".metadata", "__0_0.distcp", "__1_0.distcp", "__2_0.distcp", "best.pt", "checkpoint.json"]
    copies = []
    for number, file in enumerate(files):
        for kind in ("flip", "gone"):
            copies.append((file, two(3, f"{kind}{number}")))
            path = copies[-1][1] / NEWEST / file
            if kind == "flip":
                flip(path, 0.6)
            else:
                path.unlink()
    for rank, outcomes in enumerate(run_ranks(world_size, _find_rank, [copy for _, copy in copies], 3)):
        for (file, _), (step, wrong, said) in zip(copies, outcomes, strict=True):
            assert (step, wrong) == (10, []), file
            assert len(said) == (rank == 0)
            assert all(f"{NEWEST}: {file}" in text for text in said)
    for _, copy in copies:
        assert folders(copy) == [*names(10), f"{NEWEST}.damaged"]


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [0, 2])
def test_when_all_are_damaged_all_are_named_and_nothing_on_disk_changes(two, world_size):
    directory = two(3)
    flip(directory / names(10)[0] / "__2_0.distcp", 0.3)
    (directory / NEWEST / "checkpoint.json").unlink()
    before = tree(directory)
    ranks = run_ranks(world_size, _latest_rank, directory) if world_size else [catch(quiet(directory).latest)]
    for error, text in ranks:
        assert error == "InputError"
        assert f"none of the 2 checkpoints in {directory} can be used" in text
        assert f"{names(10)[0]}: __2_0.distcp is damaged" in text
        assert f"{NEWEST}: checkpoint.json is missing" in text
        assert "--fresh --force" in text
    assert tree(directory) == before


def _latest_rank(rank, directory):
    checkpoints = quiet(directory, distributed.current_world("cpu"))
    outcome = catch(checkpoints.latest)
    checkpoints.close()
    return outcome


def test_a_checkpoint_that_the_caller_refuses_is_passed_over(two):
    directory = two()
    said, asked = [], []

    def refuse(found):
        asked.append((found.step, found.record))
        return "its trajectory is gone" if found.step == 20 else ""

    found = Checkpoints(directory, LONE, say=said.append).latest(refuse)
    assert found == Checkpoint(directory / names(10)[0], 10, {"step": 10})
    assert asked == [(20, {"step": 20}), (10, {"step": 10})]
    assert said == [f"warning: checkpoint {NEWEST}: its trajectory is gone; the one before it is used"]
    directory = two(name="again")
    before = tree(directory)
    with pytest.raises(InputError, match=r"none of the 2 checkpoints .*step_0000000020: no; step_0000000010: no"):
        quiet(directory).latest(lambda found: "no")
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
    assert quiet(tmp_path / "none").latest() is None
    (tmp_path / "some" / ".unfinished_step_0000000001").mkdir(parents=True)
    (tmp_path / "some" / "step_0000000001.damaged").mkdir()
    assert quiet(tmp_path / "some").latest() is None


@pytest.mark.parametrize("keep", [2, 3])
def test_exactly_the_newest_are_kept(tmp_path, keep):
    directory = tmp_path / "c"
    checkpoints = quiet(directory, keep=keep)
    for number, step in enumerate((1, 2, 5, 7, 30), 1):
        checkpoints.save(step, state(step, LONE), {"step": step}, wait=True)
        assert folders(directory) == names(*(1, 2, 5, 7, 30)[max(0, number - keep) : number])
    checkpoints.close()
    checkpoints.remove_all()
    assert not directory.exists()


def test_keep_one_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"keep=1 must be at least 2"):
        Checkpoints(tmp_path, LONE, keep=1)


def test_a_step_that_is_saved_is_not_saved_again(two):
    directory = two()
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    checkpoints = quiet(directory)
    assert checkpoints.latest().step == 20
    checkpoints.save(20, state(77, LONE), {"step": 20}, wait=True)
    checkpoints.save(20, state(77, LONE), {"step": 20})
    checkpoints.close()
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == before
    assert find(directory) == (20, [], [])


def test_a_save_replaces_a_folder_of_its_step_from_an_abandoned_branch(two):
    directory = two()
    checkpoints = quiet(directory)
    assert checkpoints.latest(lambda found: "" if found.step == 10 else "no").step == 10
    (directory / f"{NEWEST}.abandoned").rename(directory / NEWEST)
    (directory / NEWEST / "left.txt").write_text("of the abandoned branch")
    checkpoints.save(20, state(21, LONE), {"step": 20}, wait=True)
    checkpoints.close()
    assert folders(directory) == names(10, 20)
    assert not (directory / NEWEST / "left.txt").exists()
    tensors = blank(LONE)
    found = quiet(directory).latest()
    quiet(directory).load(found, tensors)
    assert differing(tensors, 21, LONE) == []


def test_files_that_go_along_do_not_change_with_the_original(tmp_path, monkeypatch):
    """The original is replaced, as everything here is; where a link cannot be made it is copied."""
    directory, best = tmp_path / "c", tmp_path / "best.pt"
    checkpoints = quiet(directory, asynchronous=False)
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

PUBLISHED = ("after the rename", "after the sync of the folder", "retired", "in the removal")
POINTS = ["before the data", "at the first sync of data", "after the data", "before .metadata", "at the rename of .metadata",
          "after .metadata", "hashing", "before checkpoint.json", "after checkpoint.json", "before the rename", *PUBLISHED]
POINTS_OF_OTHERS = ["before the data", "at the first sync of data", "after the data", "hashing", "told", "at the end"]


def _die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


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


def _arm(point, published):
    """Kill this process when it comes to this point."""
    from torch.distributed.checkpoint.filesystem import FileSystem

    def at_publication(path, target):
        if target.name == published:
            _die()

    def half_removed(path, *_, **__):
        next(path.glob("*.distcp")).unlink()
        _die()

    gathers = []

    def at_gather(number):
        def count(*_):
            gathers.append(0)
            if len(gathers) == number:
                _die()
        return count

    owner, name, when, action = {
        "before the data": (dcp.FileSystemWriter, "write_data", "before", _die),
        "at the first sync of data": (os, "fsync", "before", _die),
        "after the data": (dcp.FileSystemWriter, "write_data", "after", _die),
        "before .metadata": (dcp.FileSystemWriter, "finish", "before", _die),
        "at the rename of .metadata": (FileSystem, "rename", "before", _die),
        "after .metadata": (dcp.FileSystemWriter, "finish", "after", _die),
        "hashing": (checkpoint, "_describe", "before", _die),
        "told": (distributed, "gather_objects", "before", at_gather(4)),  # guard, folder, outcomes; then the verdict
        "at the end": (distributed, "gather_objects", "after", at_gather(4)),
        "before checkpoint.json": (checkpoint, "write_atomically", "before", _die),
        "after checkpoint.json": (checkpoint, "write_atomically", "after", _die),
        "before the rename": (Path, "rename", "before", at_publication),
        "after the rename": (Path, "rename", "after", at_publication),
        "after the sync of the folder": (checkpoint, "sync_folder", "after", _die),
        "retired": (checkpoint, "_retire", "after", _die),
        "in the removal": (shutil, "rmtree", "before", half_removed),
    }[point]
    _around(owner, name, **{when: action})


def _killed_rank(rank, directory, point, victim, asynchronous):
    world = distributed.current_world("cpu")
    checkpoints = quiet(directory, world, asynchronous=asynchronous)
    assert checkpoints.latest().step == 20
    if rank == victim:
        _arm(point, names(30)[0])
    checkpoints.save(30, state(30, world), {"step": 30})
    checkpoints.finish()


def _check_killed(directory, codes, victim, world_size, steps):
    assert codes[victim] == -signal.SIGKILL, codes
    listed = folders(directory)
    step, wrong, said = find(directory, num_ranks=1)
    assert step in steps, (step, listed)
    assert (wrong, said) == ([], []), "whole, and nothing had to be set aside"
    save_steps(directory, (40,))
    assert folders(directory) == names(step, 40), listed
    assert find(directory)[:2] == (40, [])


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("point", POINTS)
def test_killed_while_saving_there_is_a_whole_checkpoint(two, point, world_size):
    directory = two(world_size)
    codes = exit_codes(world_size, _killed_rank, directory, point, 0, world_size == 2, patience=2.0)
    _check_killed(directory, codes, 0, world_size, {30 if point in PUBLISHED else 20})


@pytest.mark.distributed
@pytest.mark.parametrize("asynchronous", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("point", POINTS_OF_OTHERS)
def test_another_rank_killed_while_saving(two, point, asynchronous):
    directory = two(2)
    codes = exit_codes(2, _killed_rank, directory, point, 1, asynchronous, patience=2.0)
    _check_killed(directory, codes, 1, 2, {20, 30} if point == "told" else {30} if point == "at the end" else {20})


# ---- a disk that is full


def _limit_files(num_bytes):
    """Writes beyond so many bytes of a file fail, as they do on a full disk; None lifts it."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if num_bytes is None else num_bytes, hard))


def _large(seed, world, num_samples=60_000):
    first, end = shard_bounds(num_samples, world.world_size, world.rank)
    table = torch.arange(num_samples, dtype=torch.float64) + seed
    return {"table": as_shard(table[first:end].clone(), num_samples, world)}


def _full_disk_rank(rank, directory, ranks, wait, stop):
    world = distributed.current_world("cpu")
    said = []
    checkpoints = Checkpoints(directory, world, say=said.append, stop_on_error=stop, timeout_seconds=30)
    checkpoints.save(10, _large(10, world), {}, wait=True)
    if rank in ranks:
        _limit_files(64 << 10)
    outcomes = [catch(lambda: checkpoints.save(20, _large(20, world), {}, wait=wait))]
    if not wait:
        outcomes.append(catch(checkpoints.finish))
    _limit_files(None)
    distributed.barrier()
    left = folders(directory)
    distributed.barrier()
    checkpoints.save(30, _large(30, world), {}, wait=True)
    found = checkpoints.latest()
    tensors = _large(0, world)
    checkpoints.load(found, tensors)
    same = bits_of(tensors["table"]) == bits_of(_large(found.step, world)["table"])
    checkpoints.close()
    return outcomes, checkpoints.num_failed, left, found.step, same, said


@pytest.mark.distributed
@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("wait", [False, True])
@pytest.mark.parametrize(("world_size", "ranks"), [
    (2, [1]), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, [0]), (2, [0]), (3, [0, 1, 2])))])
def test_a_full_disk_costs_one_checkpoint_and_no_more(tmp_path, world_size, ranks, wait, stop):
    directory = tmp_path / "c"
    for rank, (outcomes, num_failed, left, step, same, said) in enumerate(
            run_ranks(world_size, _full_disk_rank, directory, ranks, wait, stop)):
        assert num_failed == 1
        assert left == names(10), "nothing half written stays"
        assert (step, same) == (30, True)
        if stop:
            assert [error for error, _ in outcomes] == (["InputError"] if wait else ["", "InputError"])
            assert said == []
            assert "checkpoint at step 20 failed (rank" in outcomes[-1][1]
            assert "disk is full" in outcomes[-1][1]
        else:
            assert all(outcome == ("", "") for outcome in outcomes)
            assert len(said) == (rank == 0)
            assert all("warning: checkpoint at step 20 failed (rank" in text and "the run goes on" in text for text in said)


def _cannot_publish_rank(rank, directory, name, wait):
    world = distributed.current_world("cpu")

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    owner, where = {"write_atomically": (checkpoint, 0), "rename": (Path, 0), "mkdir": (Path, 0), "_describe": (checkpoint, 1)}[
        name]
    said = []
    checkpoints = Checkpoints(directory, world, say=said.append)
    checkpoints.save(10, state(10, world), {"step": 10}, wait=True)
    real = getattr(owner, name)
    if rank == where:
        setattr(owner, name, fail)
    checkpoints.save(20, state(20, world), {"step": 20}, wait=wait)
    checkpoints.finish()
    setattr(owner, name, real)
    distributed.barrier()
    left = folders(directory)
    distributed.barrier()
    checkpoints.save(20, state(20, world), {"step": 20}, wait=wait)
    checkpoints.close()
    return checkpoints.num_failed, left, find(directory, world, 2)[:2], said


@pytest.mark.distributed
@pytest.mark.parametrize("wait", [False, True])
@pytest.mark.parametrize("name", ["write_atomically", "rename", "mkdir", "_describe"])
def test_what_fails_beside_the_tensors_fails_for_all(tmp_path, name, wait):
    for rank, (num_failed, left, found, said) in enumerate(run_ranks(2, _cannot_publish_rank, tmp_path / "c", name, wait)):
        assert (num_failed, left, found) == (1, names(10), (20, []))
        assert len(said) == (rank == 0)
        assert all("No space left on device" in text for text in said)


# ---- in the background


def _changed_rank(rank, directory):
    world = distributed.current_world("cpu")
    checkpoints = quiet(directory, world)
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
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_state_may_change_as_soon_as_save_returns(tmp_path, world_size):
    for found, was_under_way in run_ranks(world_size, _changed_rank, tmp_path):
        assert found == (3, [], [])
        assert was_under_way
    assert find(tmp_path, num_ranks=world_size) == (3, [], [])


def test_the_state_may_change_as_soon_as_save_returns_without_ranks(tmp_path):
    checkpoints = quiet(tmp_path)
    tensors = state(4, LONE)
    checkpoints.save(4, tensors, {"step": 4})
    for tensor in tensors.values():
        tensor.zero_()
    checkpoints.close()
    assert find(tmp_path) == (4, [], [])


def _guarded_rank(rank, directory):
    world = distributed.current_world("cpu")
    asked = []

    def guard():
        asked.append(rank)
        if len(asked) == 2:
            raise InputError("taken over by another job")

    checkpoints = quiet(directory, world, guard=guard)
    checkpoints.save(1, state(1, world), {"step": 1})
    outcome = catch(lambda: checkpoints.save(2, state(2, world), {"step": 2}))
    distributed.barrier()
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
    checkpoints = quiet(directory, world)

    def broken(*_, **__):
        raise ZeroDivisionError("a defect")

    checkpoint._describe = broken
    checkpoints.save(1, state(1, world), {})
    return catch(checkpoints.finish)


@pytest.mark.distributed
def test_a_defect_in_the_background_is_raised_where_somebody_looks(tmp_path):
    assert run_ranks(1, _defect_rank, tmp_path) == [("ZeroDivisionError", "a defect")]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("num_runs", "end"), [(30, "as tdds does"), (6, "as python does")])
def test_processes_with_saves_behind_them_end_in_order(tmp_path, num_runs, end):
    """gloo aborts a process whose groups outlive their last user."""
    for run in range(num_runs):
        for attempt in range(3):
            folder = tmp_path / f"{run} {attempt}"
            folder.mkdir()
            codes = exit_codes(2, _session_rank, folder, end, patience=10.0)
            if NOT_MET_AGAIN not in codes:
                break
        assert codes == [0, 0], run
        assert find(folder / "c", num_ranks=2) == (3, [], [])


NOT_MET_AGAIN = 112


def _session_rank(rank, directory, end):
    """A program of its own, from joining the group to its end."""
    dist.destroy_process_group()
    port = directory / "port"
    if rank == 0:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            (directory / "new").write_text(str(found.getsockname()[1]))
        (directory / "new").rename(port)
    while not port.exists():
        time.sleep(0.005)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port.read_text()}
    has_met = False
    try:
        with distributed.session("cpu", timeout_seconds=30) as world:
            has_met = True
            checkpoints = quiet(directory / "c", world)
            for step in (1, 2, 3):
                checkpoints.save(step, state(step, world), {"step": step})
            checkpoints.close()
    except InputError:
        os._exit(1 if has_met else NOT_MET_AGAIN)
    if end == "as python does":  # with the destructors of all that is left; takes seconds in a forked process
        ctypes.pythonapi.Py_Exit(0)
    os._exit(0)


# ---- nothing in a checkpoint is executed


class Call:
    """Pickles as a call of something."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def named(module, name, *arguments):
    """A pickle that looks up `name` in `module`, dots included, and calls it."""
    text = b"".join(b"\x8c" + bytes([len(part)]) + part for part in (module.encode(), name.encode()))
    inner = pickle.dumps(arguments, protocol=4)[2:-1]
    return b"\x80\x04" + text + b"\x93" + inner[9:] + b"R."


def seal(folder):
    """Make checkpoint.json fit to the files, as somebody would who wants them loaded."""
    path = folder / "checkpoint.json"
    content = json.loads(path.read_text())
    del content["sha256"]
    content["files"] = {file.name: checkpoint._describe(file) for file in folder.iterdir() if file.name != path.name}
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


@pytest.mark.parametrize("kind", list(hostile_pickles(Path("x"))))
def test_a_hostile_metadata_is_refused_before_it_runs(two, tmp_path, kind):
    directory, mark = two(), tmp_path / "mark"
    content = hostile_pickles(mark)[kind]
    (directory / NEWEST / ".metadata").write_bytes(content)
    seal(directory / NEWEST)
    checkpoints = quiet(directory)
    found = checkpoints.latest()
    assert found.step == 20, "its hashes fit"
    for call in (lambda: checkpoints.describe(found), lambda: checkpoints.load(found, blank(LONE))):
        error, text = catch(call)
        assert error == "InputError", (error, text)
        assert "was not written by tdds" in text
        assert not mark.exists()


def test_the_hostile_pickles_would_run(tmp_path):
    mark = tmp_path / "mark"
    for kind, content in hostile_pickles(mark).items():
        if kind in ("persistent", "torch_load", "getattr", "import", "bytes_entry"):
            continue
        found = pickle.loads(content)
        if kind == "partial":
            found()
        assert mark.exists(), kind
        mark.unlink()


@pytest.mark.parametrize("content", [b"", b"\x80\x04", pickle.dumps([1, 2]), pickle.dumps(7), pickle.dumps(None), b"garbage",
                                     pickle.dumps(dcp.metadata.Metadata(None)), pickle.dumps({"a": 1}),
                                     pickle.dumps(dcp.metadata.Metadata({"weight": 3}))])
def test_a_metadata_that_is_none_is_an_input_error(two, content):
    directory = two()
    (directory / NEWEST / ".metadata").write_bytes(content)
    seal(directory / NEWEST)
    checkpoints = quiet(directory)
    found = checkpoints.latest()
    error, text = catch(checkpoints.load, found, blank(LONE))
    assert error == "InputError", (error, text)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_is_not_a_tensor_is_not_unpickled(two, tmp_path):
    """A checkpoint of torch's own, with an object in it, in one of our folders."""
    directory, mark = two(), tmp_path / "mark"
    folder = directory / NEWEST
    record = (folder / "checkpoint.json").read_text()
    shutil.rmtree(folder)
    hostile = {"weight": torch.zeros(3, 4, 5), "extra": Call(os.system, f"touch {mark}")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(hostile, checkpoint_id=folder, no_dist=True)
    (folder / "checkpoint.json").write_text(record)
    seal(folder)
    checkpoints = quiet(directory)
    found = checkpoints.latest()
    assert found.step == 20
    for wanted in ({"weight": torch.zeros(3, 4, 5)}, {"extra": torch.zeros(3)}):
        assert catch(checkpoints.load, found, wanted)[0] == "InputError"
    assert not mark.exists()
    dcp.load({"weight": torch.zeros(3, 4, 5), "extra": None}, checkpoint_id=folder, no_dist=True)
    assert mark.exists(), "torch runs it"


def test_the_planner_does_not_unpickle_either(two, tmp_path, monkeypatch):
    """Should BytesStorageMetadata ever be let in."""
    directory, mark = two(), tmp_path / "mark"
    folder = directory / NEWEST
    shutil.copytree(folder, tmp_path / "kept")
    shutil.rmtree(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"extra": Call(os.system, f"touch {mark}")}, checkpoint_id=folder, no_dist=True)
    shutil.copy(tmp_path / "kept" / "checkpoint.json", folder)
    seal(folder)
    monkeypatch.setattr(checkpoint._Unpickler, "_OF_DCP", checkpoint._Unpickler._OF_DCP | {"BytesStorageMetadata"})
    monkeypatch.setattr(Checkpoints, "describe", lambda *_: {"extra": torch.zeros(3, device="meta")})
    checkpoints = quiet(directory)
    error, text = catch(checkpoints.load, checkpoints.latest(), {"extra": torch.zeros(3)})
    assert error == "InputError", (error, text)
    assert not mark.exists()


def test_a_hostile_tensor_is_refused(two, tmp_path):
    """The data of a tensor is read by torch.load, which must not unpickle objects."""
    directory, mark = two(), tmp_path / "mark"
    folder = directory / NEWEST
    with (folder / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    hostile = io.BytesIO()
    torch.save(Call(os.system, f"touch {mark}"), hostile)
    (folder / "__0_0.distcp").write_bytes(hostile.getvalue())
    for info in metadata.storage_data.values():
        info.offset, info.length = 0, len(hostile.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    seal(folder)
    checkpoints = quiet(directory)
    error, text = catch(checkpoints.load, checkpoints.latest(), {"weight": torch.zeros(3, 4, 5)})
    assert error == "InputError", (error, text)
    assert not mark.exists()
