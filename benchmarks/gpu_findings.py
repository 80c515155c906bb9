"""What the parts of `benchmarks.gpu_acceptance` share: how large they are, and a file that holds
what a part has found so far, also when it is ended in the middle."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks import files
from tdds_dist.runs.artifacts import write_atomically


@dataclass(frozen=True)
class Sizes:
    """How large the parts are: `REAL` for a GPU, `TOY` for the CPU.

    `cells`: rows and steps of an epoch by the batch that a part is called after. `networks`: those
    to train by the name in parts. `side`: pixels that a network sees. `loop_seconds`: of the real
    loop. `start_seconds`: the longest until a run has ended its first epoch.
    """

    device: str
    num_samples: int
    num_classes: int
    batch: int
    race_classes: tuple[int, ...]
    race_rows: int
    race_repetitions: int
    kernel_rows: tuple[int, ...]
    kernel_steps: int
    networks: dict[str, str]
    side: int
    cells: dict[int, tuple[int, int]]
    cell_rounds: int
    creep_images: int
    creep_passes: int
    run_images: int
    loop_images: int
    loop_rows: int
    loop_rounds: int
    loop_seconds: float
    start_seconds: float

    @property
    def on_gpu(self) -> bool:
        """Say whether there is something to measure."""
        return self.device == "cuda"


REAL = Sizes(
    device="cuda",
    num_samples=1_281_167,
    num_classes=1000,
    batch=256,
    race_classes=(1000, 4096),
    race_rows=8192,
    race_repetitions=2000,
    kernel_rows=(256, 8192),
    kernel_steps=50,
    networks={"resnet34": "resnet34", "swin_t": "swin_t"},
    side=224,
    cells={256: (256, 20), 32: (32, 50)},
    cell_rounds=3,
    creep_images=2048,
    creep_passes=20,
    run_images=512,
    loop_images=10_240,
    loop_rows=256,
    loop_rounds=2,
    loop_seconds=60.0,
    start_seconds=120.0,
)
TOY = Sizes(
    device="cpu",
    num_samples=96,
    num_classes=10,
    batch=32,
    race_classes=(10,),
    race_rows=8,
    race_repetitions=2,
    kernel_rows=(8,),
    kernel_steps=2,
    networks={"resnet34": "squeezenet1_1", "swin_t": "squeezenet1_1"},
    side=64,
    cells={256: (8, 2), 32: (4, 3)},
    cell_rounds=1,
    creep_images=32,
    creep_passes=3,
    run_images=48,
    loop_images=32,
    loop_rows=8,
    loop_rounds=1,
    loop_seconds=8.0,
    start_seconds=400.0,
)


class Findings:
    """What a part has found, written to a file at once, line by line.

    `rows`: what, found, wanted (empty where it is only a number), and whether it is as wanted
    (None: not judged). `metrics`: what `benchmarks.compare` reads.
    """

    def __init__(self, path: Path):
        self._path = path
        self.content: dict[str, Any] = {"rows": [], "metrics": {}}

    def value(self, what: str, found: Any) -> None:
        """Note a number, or words, that nothing is wanted of."""
        self._add(what, found, "", None)

    def check(self, what: str, found: Any, wanted: str, is_met: bool) -> None:
        """Note what was found, what was wanted, and whether it is so."""
        self._add(what, found, wanted, bool(is_met))

    def skipped(self, what: str, why: str) -> None:
        """Note what was not tried."""
        self._add(what, f"not tried: {why}", "", None)

    def metric(
        self,
        name: str,
        values: Sequence[float],
        unit: str,
        better: Literal["higher", "lower"],
        *,
        relative: bool = False,
    ) -> None:
        """Note a figure that other runs are compared with."""
        self.content["metrics"][name] = files.metric(values, unit, better, relative=relative)
        self._save()

    def keep(self, name: str, value: Any) -> None:
        """Note something as it is, beside the rows."""
        self.content[name] = value
        self._save()

    def _add(self, what: str, found: Any, wanted: str, is_met: bool | None) -> None:
        row = {"what": what, "found": found, "wanted": wanted, "is_met": is_met}
        self.content["rows"].append(row)
        print(f"  {what}: {found}" + (f" (wanted: {wanted})" if wanted else ""), flush=True)
        self._save()

    def _save(self) -> None:
        text = json.dumps(self.content, default=str)
        write_atomically(self._path, lambda file: file.write(text.encode()))
