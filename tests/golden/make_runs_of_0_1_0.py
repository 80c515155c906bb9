"""Make runs_of_0_1_0.tar.xz: run directories of version 0.1.0, for tests/test_older_runs.py. Was
run with commit b33b127:

    cd $(mktemp -d) && PYTHONPATH=CHECKOUT:tests/site OMP_NUM_THREADS=1 python THIS_FILE, and keep
    runs_of_0_1_0.tar.xz from there.

data/, config.yaml, table.yaml   40 and 20 digits, a config, an experiment of three methods
runs/finished                    a collection, its coreset, a finished retraining and one stopped by SIGTERM
runs/unfinished                  the same collection, stopped by SIGTERM in the middle of epoch 3 of 4
runs/table                       the experiment, interrupted: one retraining done, one in its second epoch, one missing
expected.json                    which instructions torch used; final losses of the experiment's retrainings once it has gone on
"""

import json
import os
import shutil
import signal
import socket
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import torch

CORESET = "runs/finished/coresets/tdds_official_T4_K3_beta0.9_p0.5.npz"
CONFIG = """
run: {name: older, device: cpu}
data: {train: data/train.beton, val: data/val.beton, num_classes: 10, image_size: 32, crop: pad, padding: 2, flip: true,
       mean: [78.0, 78.0, 78.0], std: [90.0, 90.0, 90.0], num_workers: 1}
model: {name: tiny_network}
train: {epochs: 4, global_batch_size: 10, lr: 0.1, deterministic: true}
score: {windows: [{T: 4, K: 3, pruning_rates: [0.5]}, {T: 3, K: 3, pruning_rates: [0.8]}]}
checkpoint: {asynchronous: false}
"""
TABLE = (
    "{name: table, config: config.yaml, methods: [tdds, moderate, random], pruning_rates: [0.5]}\n"
)


def in_this_process(
    items: list[Any], work: Callable[[Any], Any], jobs: int
) -> Iterator[tuple[Any, Any]]:
    """Do what `run_in_processes` does without processes, which would not know the network."""
    for item in items:
        # `work` replaces them for good
        with redirect_stdout(sys.stdout), redirect_stderr(sys.stderr):
            outcome = work(item)
        yield item, outcome


@contextmanager
def at_step(step: int, action: Callable[[], object]) -> Iterator[None]:
    """Act after optimizer step `step` of a training."""
    from tdds_dist.engine import Trainer

    update = Trainer._update

    def hurt(trainer: Trainer) -> float:
        lr = update(trainer)
        if trainer.step == step:
            action()
        return lr

    with mock.patch.object(Trainer, "_update", hurt):
        yield


def run(*words: str, code: int = 0) -> None:
    from tdds_dist.cli import outcome

    sys.argv = ["tdds", *words]
    found = outcome()
    assert found[0] == code, found
    if code == 130:  # a program would end here
        torch.distributed.destroy_process_group()


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def interrupt_second_retraining(work: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Leave the first of the tasks that are retrainings alone, and end the second in its second
    epoch."""
    numbers = iter(range(2))

    def interrupted(task: Any) -> Any:
        if task.coreset_file is None or next(numbers) == 0:
            return work(task)
        with at_step(3, lambda: signal.raise_signal(signal.SIGINT)):
            return work(task)

    return interrupted


def main() -> None:
    import numpy as np

    from tdds_dist import experiment

    Path("config.yaml").write_text(CONFIG)
    Path("table.yaml").write_text(TABLE)
    for split, num in (("train", "40"), ("val", "20")):
        run(
            *f"write digits data/{split}.beton --split".split(),
            split,
            "--subset",
            num,
            *"--write-mode raw --num-workers 1".split(),
        )
    retrain = "retrain", "config.yaml", "run.dir=runs/finished", "--coreset", CORESET, "--strategy"
    run("collect", "config.yaml", "run.dir=runs/finished")
    run("score", "runs/finished", "--score", "el2n", "el2n_epochs=2")
    run("select", "runs/finished", "--pruning-rate", "0.5")
    run(*retrain, "E")
    with at_step(5, stop):
        run(*retrain, "P", code=75)
    with at_step(10, stop):
        run("collect", "config.yaml", "run.dir=runs/unfinished", code=75)
    with mock.patch.object(experiment, "_work", interrupt_second_retraining(experiment._work)):
        run("experiment", "table.yaml", code=130)

    shutil.copytree("runs", "before")
    run("collect", "config.yaml", "run.dir=runs/unfinished")
    for file in Path("runs/finished/scores").glob("tdds_*.npz"):
        a, b = (
            np.load(folder / file.name)["score"]
            for folder in (file.parent, Path("runs/unfinished/scores"))
        )
        assert a.tobytes() == b.tobytes(), file
    run("experiment", "table.yaml")
    losses = {
        file.parent.name: json.loads(file.read_text())["final_loss"]
        for file in Path("runs/table/seed0/retrain").glob("*/result.json")
    }
    expected = {"cpu_capability": torch.backends.cpu.get_cpu_capability(), "final_loss": losses}
    Path("expected.json").write_text(json.dumps(expected, indent=2) + "\n")
    shutil.rmtree("runs")
    Path("before").rename("runs")
    with tarfile.open("runs_of_0_1_0.tar.xz", "w:xz", preset=9) as archive:
        for name in ("expected.json", "config.yaml", "table.yaml", "runs", "data"):
            archive.add(
                name, filter=lambda file: file.replace(uid=0, gid=0, uname="", gname="", deep=False)
            )


if __name__ == "__main__":
    os.environ["TDDS_CPUS_PER_RANK"] = "1"
    socket.gethostname = lambda: "a-machine"
    with mock.patch("tdds_dist.experiment.run_in_processes", in_this_process):
        main()
