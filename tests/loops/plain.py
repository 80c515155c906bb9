"""What the tests of all loops share: running a program that keeps what it saw, and a plain loop over
that."""

import multiprocessing
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from tdds_dist import ShardedScorer, Window, load_scores
from tdds_dist.scoring.trajectory import Trajectory
from tests.jobs import free_port
from tests.ranks import forkserver

LIBRARIES = ("lightning", "transformers", "timm")
FOLDER = Path(__file__).parent
N, C, BATCH, EPOCHS = 43, 5, 4, 4
WINDOWS = [Window(T=4, K=3, beta=0.9), Window(T=3, K=3, beta=0.5)]


def run(program, ranks, folder, *words, code=0, wrapper=()):
    """Run a program of this folder. Several ranks that go on are started by torchrun; others find all
    libraries loaded, as to load them takes longer than the rest."""
    folder.mkdir(exist_ok=True)
    command = [*map(str, wrapper), str(FOLDER / program), str(folder), *map(str, words)]
    if ranks > 1 and "resume" in words:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*torchrun, "--nproc-per-node", str(ranks), *command]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parents[1])}
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
        assert done.returncode == code, done.stderr
        return
    forkserver.set_forkserver_preload([*LIBRARIES, "torch._dynamo", "tests.preloaded"])
    launched = {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port(), "GLOO_SOCKET_IFNAME": "lo"}
    launched |= {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    said, processes = [folder / f"said{rank}.txt" for rank in range(ranks)], []
    for rank in range(ranks):
        place = launched | {"RANK": rank, "LOCAL_RANK": rank} if ranks > 1 else {}
        environment = {name: str(value) for name, value in place.items()} | {"OMP_NUM_THREADS": "1"}
        process = forkserver.Process(target=_begin, args=(command, said[rank], environment))
        process.start()
        processes.append(process)
    try:
        for process in processes:
            process.join(120)
    finally:
        for process in processes:
            process.kill()
            process.join()
    codes = {process.exitcode for process in processes}
    # of ranks that are stopped one may see that the other is gone
    assert codes == {code} or (code and code in codes and 0 not in codes), [
        path.read_text() for path in said
    ]


def _begin(command, said, environment):
    """Be `python` with this command."""
    multiprocessing.set_start_method("fork", force=True)  # Python's own, for workers
    os.environ |= environment
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    is_module = command[0] == "-m"
    sys.argv = command[is_module:]
    start = runpy.run_module if is_module else runpy.run_path
    start(sys.argv[0], run_name="__main__")


def plain(folder, ranks):
    """The scores of a plain loop over the same forward passes; a sample that accelerate repeats at
    the end of an epoch counts where it came first."""
    scorer = ShardedScorer(N, C, WINDOWS, device="cpu")
    per_epoch = -(-N // (BATCH * ranks))
    files = sorted(folder.glob("seen_*.npz"))
    steps = [files[at : at + ranks] for at in range(0, len(files), ranks)]
    assert len(steps) == EPOCHS * per_epoch
    label_N = np.load(folder / "result.npz")["label"]
    for epoch in range(EPOCHS):
        seen = set()
        for paths in steps[epoch * per_epoch :][:per_epoch]:
            for path in paths:
                with np.load(path) as rows:
                    index_B, logits_BC = rows["index"], torch.from_numpy(rows["logits"])
                is_first_B = [not (index in seen or seen.add(index)) for index in index_B.tolist()]
                label_B = torch.from_numpy(label_N[index_B])
                index_B = torch.from_numpy(np.where(is_first_B, index_B, -1))
                scorer.record(index_B, logits_BC, label_B)
        scorer.end_epoch()
    return {f"T{window.T}": score_N.numpy() for window, score_N in scorer.gather().items()}


def check(folder, ranks, given=True):
    """Compare the files of scores with the plain loop, and what the program was `given`, which put
    it into result.npz."""
    expected, found = plain(folder, ranks), np.load(folder / "result.npz")
    for window in WINDOWS:
        key = f"T{window.T}"
        if given:
            assert found[key].tobytes() == expected[key].tobytes(), key
        written = load_scores(folder / "scored" / "scores" / f"{window.key('official')}.npz")
        assert written.score_N.tobytes() == expected[key].tobytes()
        assert written.label_N.tolist() == found["label"].tolist()
    assert len(Trajectory(folder / "scored" / "trajectory").read("p_label")) == EPOCHS
