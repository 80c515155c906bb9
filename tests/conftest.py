"""Small datasets shared by the tests, written once per session."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # started in the background: programs under test would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def betons(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files: `train` and `val` (digits, JPEG), `raw` (97 random images of 32x32, uncompressed), `big` (61 of 80x80, JPEG)."""
    from tdds_dist.beton_writer import write_beton
    from tdds_dist.sources import open_source

    folder = tmp_path_factory.mktemp("betons")
    wanted = {
        "train": ("digits", "train", 120, "jpg"), "val": ("digits", "val", 50, "jpg"),
        "raw": ("synthetic:97,5,32", "train", None, "raw"), "big": ("synthetic:61,5,80", "train", None, "jpg"),
    }
    paths = {}
    for name, (spec, split, subset, mode) in wanted.items():
        paths[name] = folder / f"{name}.beton"
        write_beton(open_source(spec, split, subset), paths[name], write_mode=mode, num_workers=1, progress=False)
    return paths


@pytest.fixture
def config_file(betons: dict[str, Path], tmp_path: Path) -> Path:
    """A config that trains on 120 digits in seconds; run directory `tmp_path/run`."""
    path = tmp_path / "config.yaml"
    path.write_text(f"""
run: {{name: tiny, dir: {tmp_path / "run"}, device: cpu}}
data: {{train: {betons["train"]}, val: {betons["val"]}, num_classes: 10, image_size: 32, crop: pad, padding: 2, flip: false,
       mean: [78.0, 78.0, 78.0], std: [90.0, 90.0, 90.0]}}
model: {{name: shufflenet_v2_x0_5}}
train: {{epochs: 3, global_batch_size: 24, lr: 0.05}}
score: {{windows: [{{T: 3, K: 2, pruning_rates: [0.0, 0.5]}}, {{T: 2, K: 2, pruning_rates: [0.8]}}]}}
""")
    return path


@pytest.fixture(scope="session")
def browser() -> "Iterator[Browser]":
    """A headless Chromium; Playwright allows one at a time in a thread."""
    from browser.chromium import find, launched

    if find() is None:
        pytest.skip("no Chromium found: tests/browser/install.sh")
    with launched() as browser:
        yield browser
