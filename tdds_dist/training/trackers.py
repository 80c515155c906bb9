"""The numbers of epochs for trackers of experiments: TensorBoard, Weights & Biases, MLflow.

One class per tracker, with `write` and `close`; each imports its package at the first record, so
that nothing is needed that is not named in `run.trackers`. Training neither waits for a tracker
elsewhere (W&B, MLflow) nor ends because of it.
"""

import importlib.util
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from tdds_dist.config.run import Config, to_dict
from tdds_dist.errors import InputError
from tdds_dist.runs.artifacts import write_atomically
from tdds_dist.runs.directory import RunDir, read_object

PROJECT = "tdds"  # of W&B, and experiment of MLflow, where their own variables name no other
CLOSING_SECONDS = 30.0  # that the end of a training waits for a tracker
log = logging.getLogger("tdds")


def check_trackers(config: Config) -> None:
    """Raise InputError for a tracker that is not installed."""
    for name in config.run.trackers:
        if importlib.util.find_spec(name) is None:
            raise InputError(
                f"run.trackers names {name}, which is not installed; `pip install {name}`, or leave"
                " it out"
            )


class Trackers:
    """All trackers of a run; for the main rank."""

    def __init__(self, config: Config, run: RunDir):
        kinds: dict[str, type[WandB] | type[MLflow]] = {"wandb": WandB, "mlflow": MLflow}
        self._trackers: list[Any] = [
            TensorBoard(run) if name == "tensorboard" else _Elsewhere(kinds[name](config, run))
            for name in config.run.trackers
        ]

    def write(self, record: dict[str, Any]) -> None:
        """Write the numbers of epoch `record["epoch"]`."""
        numbers = {
            key: float(value)
            for key, value in record.items()
            if key != "epoch" and value is not None
        }
        for tracker in self._trackers:
            tracker.write(record["epoch"], numbers)

    def close(self) -> None:
        """Finish writing."""
        for tracker in self._trackers:
            tracker.close()


class _Elsewhere:
    """A tracker that a server may stand behind, in a thread of its own: all ranks would wait for an
    answer otherwise. One that fails is given up with a warning."""

    def __init__(self, tracker: "WandB | MLflow"):
        self._tracker, self._name = tracker, type(tracker).__name__
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name=f"tracker {self._name}", daemon=True)

    def write(self, epoch: int, numbers: dict[str, float]) -> None:
        """Let the numbers of an epoch be written."""
        if self._thread.ident is None:
            self._thread.start()
        self._calls.put(partial(self._tracker.write, epoch, numbers))

    def close(self) -> None:
        """Finish writing, unless that takes too long."""
        if self._thread.ident is None:
            return
        self._calls.put(self._tracker.close)
        self._calls.put(None)
        self._thread.join(CLOSING_SECONDS)
        if self._thread.is_alive():
            log.warning(
                f"{self._name} does not answer within {CLOSING_SECONDS:g} s, and lacks the last"
                " epochs; metrics.jsonl has them"
            )

    def _run(self) -> None:
        try:
            for call in iter(self._calls.get, None):
                call()
        except Exception as error:
            log.warning(
                f"{self._name} failed ({' '.join(str(error).split())[:200]}); the run goes on"
                " without it"
            )


class TensorBoard:
    """TensorBoard scalars in the run directory; a resumed run replaces later epochs."""

    def __init__(self, run: RunDir):
        self._directory = run.tensorboard
        self._writer: Any = None

    def write(self, epoch: int, numbers: dict[str, float]) -> None:
        """Write the numbers of an epoch; remove later ones of an earlier start."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._directory), purge_step=epoch)
        for key, value in numbers.items():
            self._writer.add_scalar(key, value, epoch)

    def close(self) -> None:
        """Finish writing."""
        if self._writer is not None:
            self._writer.close()


class WandB:
    """A run of Weights & Biases; WANDB_PROJECT, WANDB_MODE and its other variables count."""

    def __init__(self, config: Config, run: RunDir):
        self._config, self._directory = config, run
        self._run: Any = None

    def write(self, epoch: int, numbers: dict[str, float]) -> None:
        """Write the numbers of an epoch."""
        import wandb

        if self._run is None:
            known = read_object(self._directory.trackers_file)
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=self._config.run.name,
                id=known.get("wandb"),
                resume="allow",
                dir=str(self._directory.path),
                config=to_dict(self._config),
            )
            _remember(self._directory, known | {"wandb": self._run.id})
        self._run.log(numbers | {"epoch": epoch}, step=epoch)

    def close(self) -> None:
        """Finish writing."""
        if self._run is not None:
            self._run.finish()


class MLflow:
    """A run of MLflow; MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME count."""

    def __init__(self, config: Config, run: RunDir):
        self._config, self._directory = config, run
        self._client: Any = None
        self._id = ""

    def write(self, epoch: int, numbers: dict[str, float]) -> None:
        """Write the numbers of an epoch."""
        import mlflow

        if self._client is None:
            client = mlflow.MlflowClient()
            known = read_object(self._directory.trackers_file)
            if "mlflow" not in known:
                name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
                there = client.get_experiment_by_name(name)
                experiment = there.experiment_id if there else client.create_experiment(name)
                made = client.create_run(experiment, run_name=self._config.run.name)
                known |= {"mlflow": made.info.run_id}
                parameters = [
                    mlflow.entities.Param(f"{section}.{key}", str(value)[:500])
                    for section, values in to_dict(self._config).items()
                    for key, value in values.items()
                ]
                for first in range(0, len(parameters), 100):  # at most 100 a call
                    client.log_batch(made.info.run_id, params=parameters[first : first + 100])
                _remember(self._directory, known)
            self._client, self._id = client, known["mlflow"]
        now = int(time.time() * 1000)
        self._client.log_batch(
            self._id,
            metrics=[mlflow.entities.Metric(*item, now, epoch) for item in numbers.items()],
        )

    def close(self) -> None:
        """Finish writing."""
        if self._client is not None:
            self._client.set_terminated(self._id)


def _remember(run: RunDir, ids: dict[str, str]) -> None:
    """Keep the ids that trackers gave this run, by their names, for a later start."""
    write_atomically(run.trackers_file, lambda file: file.write(json.dumps(ids).encode()))
