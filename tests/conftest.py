"""Small datasets and a finished run shared by the tests, made once per session."""

import fcntl
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# started in the background: programs under test would inherit that
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# torchvision has a small network more, here and in the programs that tests start
SITE = Path(__file__).parent / "site"
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SITE), os.environ.get("PYTHONPATH")]))
if not any(finder.__module__ == "sitecustomize" for finder in sys.meta_path):
    runpy.run_path(str(SITE / "sitecustomize.py"), run_name="sitecustomize")


# What takes longest of the slow tests, longest first. Whoever is done takes the next file: one of
# these as the last would be waited for.
LONG_FILES = "faults hosts speed_options submit throughput execute gpu_acceptance front_door cli resume scorer".split()


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # pytest-xdist: by the number of tests


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "not slow and" not in config.option.markexpr:
        place = {f"test_{name}": number for number, name in enumerate(LONG_FILES)}
        items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_collection_finish() -> None:
    gc.freeze()  # what is loaded by now is no garbage: looking takes half a second


@pytest.fixture(scope="session")
def betons(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files: `train` and `val` (digits, JPEG), `raw` (97 random images of 32x32, uncompressed),
    `big` (61 of 80x80, JPEG)."""
    from tdds_dist.data.sources import open_source
    from tdds_dist.data.writer import write_beton

    folder = tmp_path_factory.mktemp("betons")
    wanted = {
        "train": ("digits", "train", 120, "jpg"),
        "val": ("digits", "val", 50, "jpg"),
        "raw": ("synthetic:97,5,32", "train", None, "raw"),
        "big": ("synthetic:61,5,80", "train", None, "jpg"),
    }
    paths = {}
    for name, (spec, split, subset, mode) in wanted.items():
        paths[name] = folder / f"{name}.beton"
        write_beton(
            open_source(spec, split, subset),
            paths[name],
            write_mode=mode,
            num_workers=1,
            progress=False,
        )
    return paths


@pytest.fixture
def config_file(betons: dict[str, Path], tmp_path: Path) -> Path:
    """A config that trains on 120 digits in seconds; run directory `tmp_path/run`."""
    return write_config(betons, tmp_path)


def write_config(
    betons: dict[str, Path],
    folder: Path,
    epochs: int = 3,
    second: str = "T: 2, K: 2",
    more: str = "",
    network: str = "tiny_network",
) -> Path:
    path = folder / "config.yaml"
    path.write_text(f"""
run: {{name: tiny, dir: {folder / "run"}, device: cpu}}
data: {{train: {betons["train"]}, val: {betons["val"]}, num_classes: 10, image_size: 32, crop: pad, padding: 2, flip: false,
       mean: [78.0, 78.0, 78.0], std: [90.0, 90.0, 90.0]}}
model: {{name: {network}}}
train: {{epochs: {epochs}, global_batch_size: 24, lr: 0.05}}
score: {{windows: [{{T: 3, K: 2, pruning_rates: [0.0, 0.5]}}, {{{second}, pruning_rates: [0.8]}}]}}
{more}
""")
    return path


class Finished(NamedTuple):
    """A run with everything in it: collected on two ranks, scored, pruned, retrained. Never
    changed."""

    run: Path
    config: Path
    said: dict[str, str]  # what `tdds collect` printed: stdout, stderr

    @property
    def coreset(self) -> Path:
        """80 % removed, by the second window."""
        return self.run / "coresets/tdds_official_T4_K3_beta0.9_p0.8.npz"

    @property
    def retrained(self) -> Path:
        return self.run / f"retrain/{self.coreset.stem}_E_batch_seed0"


@pytest.fixture(scope="session")
def finished_run(betons: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """One for all workers of pytest-xdist: whoever comes first makes it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "finished_run"
    folder.mkdir(exist_ok=True)
    said = folder / "said.json"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not said.exists():
            said.write_text(
                json.dumps(
                    _finish(
                        folder,
                        write_config(
                            betons, folder, 5, "T: 4, K: 3", "collect: {stop_after: last_window}"
                        ),
                    )
                )
            )
    return Finished(folder / "run", folder / "config.yaml", json.loads(said.read_text()))


def _finish(folder: Path, config: Path) -> dict[str, str]:
    """Run the stages; returns what the first printed."""
    from tdds_dist.cli.main import main

    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*ranks, "-m", "tdds_dist", "collect", str(config)],
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )
    assert done.returncode == 0, done.stderr
    made = Finished(folder / "run", config, {"stdout": done.stdout, "stderr": done.stderr})
    for words in (
        ["score", made.run, "--all", "el2n_epochs=3", "uncertainty_window=3"],
        ["select", made.run, "--pruning-rate", "0.8"],
        ["retrain", config, "--coreset", made.coreset, "--strategy", "E"],
    ):
        assert main([*map(str, words), "--quiet"]) == 0, words
    return made.said


@pytest.fixture(scope="session")
def browser() -> "Iterator[Browser]":
    """A headless Chromium; Playwright allows one at a time in a thread."""
    from tests.system.browser.chromium import find, launched

    if find() is None:
        pytest.skip("no Chromium found: tests/system/browser/install.sh")
    with launched() as browser:
        yield browser
