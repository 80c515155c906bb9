"""The numbers of epochs for trackers of experiments: TensorBoard, Weights & Biases, MLflow.

One class per tracker, with `write` and `close`; it is made, and imports its package, at the first
record, so that nothing is needed that is not named in `run.trackers`. Training neither waits for a
tracker elsewhere (W&B, MLflow) nor ends because of it.
"""

import importlib.util
import json
import logging
import os
import queue
import threading
import time
from typing import Any

from tdds_dist.config.run import Config, to_dict
from tdds_dist.errors import InputError
from tdds_dist.runs.artifacts import write_atomically
from tdds_dist.runs.directory import RunDir, read_object

PROJECT = "tdds"  # of W&B, and experiment of MLflow, where their own variables name no other
CLOSING_SECONDS = 30.0  # that the end of a training waits for a tracker
_ids = threading.Lock()  # trackers begin at the same time, each in its thread
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
        self._config, self._run = config, run
        self._trackers: list[Any] | None = None

    def write(self, record: dict[str, Any]) -> None:
        """Write the numbers of epoch `record["epoch"]`."""
        epoch = record["epoch"]
        numbers = {
            key: float(value)
            for key, value in record.items()
            if key != "epoch" and value is not None
        }
        if self._trackers is None:
            kinds: dict[str, type[WandB] | type[MLflow]] = {"wandb": WandB, "mlflow": MLflow}
            self._trackers = [
                TensorBoard(self._run, epoch)
                if name == "tensorboard"
                else _Elsewhere(kinds[name], self._config, self._run)
                for name in self._config.run.trackers
            ]
        for tracker in self._trackers:
            tracker.write(epoch, numbers)

    def close(self) -> None:
        """Finish writing."""
        for tracker in self._trackers or []:
            tracker.close()


class _Elsewhere:
    """A tracker that a server may stand behind, in a thread of its own: all ranks would wait for an
    answer otherwise. One that fails is given up with a warning."""

    def __init__(self, kind: "type[WandB] | type[MLflow]", config: Config, run: RunDir):
        self._name = kind.__name__
        self._epochs: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue()
        self._thread = threading.Thread(
            target=self._work, args=(kind, config, run), name=f"tracker {self._name}", daemon=True
        )
        self._thread.start()

    def write(self, epoch: int, numbers: dict[str, float]) -> None:
        """Let the numbers of an epoch be written."""
        self._epochs.put((epoch, numbers))

    def close(self) -> None:
        """Finish writing, unless that takes too long."""
        self._epochs.put(None)
        self._thread.join(CLOSING_SECONDS)
        if self._thread.is_alive():
            log.warning(
                f"{self._name} does not answer within {CLOSING_SECONDS:g} s, and lacks the last"
                " epochs; metrics.jsonl has them"
            )

    def _work(self, kind: "type[WandB] | type[MLflow]", config: Config, run: RunDir) -> None:
        try:
            tracker = kind(config, run)
            for epoch, numbers in iter(self._epochs.get, None):
                tracker.write(epoch, numbers)
            tracker.close()
        except Exception as error:
            log.warning(
                f"{self._name} failed ({' '.join(str(error).split())[:200]}); the run goes on"
                " without it"
            )


class TensorBoard:
    """TensorBoard scalars in the run directory; those of an earlier start from `epoch` on go."""

    def __init__(self, run: RunDir, epoch: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.tensorboard), purge_step=epoch)
        self.close = self._writer.close

    def write(self, epoch: int, numbers: dict[str, float]) -> None:
        """Write the numbers of an epoch."""
        for key, value in numbers.items():
            self._writer.add_scalar(key, value, epoch)


class WandB:
    """A run of Weights & Biases; WANDB_PROJECT, WANDB_MODE and its other variables count."""

    def __init__(self, config: Config, run: RunDir):
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=config.run.name,
            id=read_object(run.trackers_file).get("wandb"),
            resume="allow",
            dir=str(run.path),
            config=to_dict(config),
        )
        _remember(run, "wandb", self._run.id)
        self.close = self._run.finish

    def write(self, epoch: int, numbers: dict[str, float]) -> None:
        """Write the numbers of an epoch."""
        self._run.log(numbers | {"epoch": epoch}, step=epoch)


class MLflow:
    """A run of MLflow; MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME count."""

    def __init__(self, config: Config, run: RunDir):
        import mlflow

        self._client = mlflow.MlflowClient()
        self._id: Any = read_object(run.trackers_file).get("mlflow")
        if self._id is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            there = self._client.get_experiment_by_name(name)
            experiment = there.experiment_id if there else self._client.create_experiment(name)
            self._id = self._client.create_run(experiment, run_name=config.run.name).info.run_id
            parameters = [
                mlflow.entities.Param(f"{section}.{key}", str(value)[:500])
                for section, values in to_dict(config).items()
                for key, value in values.items()
            ]
            for first in range(0, len(parameters), 100):  # at most 100 a call
                part = parameters[first : first + 100]
                self._client.log_batch(self._id, params=part)
            _remember(run, "mlflow", self._id)

    def write(self, epoch: int, numbers: dict[str, float]) -> None:
        """Write the numbers of an epoch."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(*item, now, epoch) for item in numbers.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        """Finish writing."""
        self._client.set_terminated(self._id)


def _remember(run: RunDir, name: str, given: str) -> None:
    """Keep the id that a tracker gave this run, for a later start."""
    with _ids:
        text = json.dumps(read_object(run.trackers_file) | {name: given})
        write_atomically(run.trackers_file, lambda file: file.write(text.encode()))
