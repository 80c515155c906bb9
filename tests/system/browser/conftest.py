"""The demo, run once with a short schedule, and its report in a browser."""

import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.system.browser.chromium import SIZES

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ROOT = Path(__file__).resolve().parents[3]
WINDOWS = (
    "[{T: 4, K: 3, pruning_rates: [0.0, 0.3, 0.5]}, {T: 3, K: 3, pruning_rates: [0.7, 0.8, 0.9]}]"
)


@dataclass(frozen=True)
class Demo:
    """What `make demo` left, with four epochs instead of thirty on one rank instead of two, and what
    it printed."""

    run: Path
    report: Path
    printed: str


@dataclass
class Opened:
    """A page, and what went wrong on it."""

    page: "Page"
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)  # of anything but the file itself


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    folder = tmp_path_factory.mktemp("demo")
    run, data = folder / "run", folder / "data"
    done = subprocess.run(
        [
            str(ROOT / "scripts/demo.sh"),
            f"run.dir={run}",
            f"data.train={data}/digits_train.beton",
            f"data.val={data}/digits_val.beton",
            "train.epochs=4",
            "train.warmup_epochs=1",
            "model.name=tiny_network",
            f"score.windows={WINDOWS}",
            "score.baselines.el2n_epochs=3",
            "score.baselines.uncertainty_window=3",
        ],
        env=os.environ | {"DEMO_RUN": str(run), "DEMO_DATA": str(data), "RANKS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return Demo(run, run / "report.html", done.stdout + done.stderr)


@pytest.fixture
def open_page(browser: "Browser") -> Iterator[Callable[..., Opened]]:
    """Opens a file: `open_page(path, size="desktop", scheme="light")`."""
    contexts = []

    def opened(
        path: Path, size: str = "desktop", scheme: str = "light", scripts: bool = True
    ) -> Opened:
        width, height = SIZES[size]
        context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme=scheme,
            java_script_enabled=scripts,
        )
        contexts.append(context)
        found = Opened(context.new_page())
        found.page.on(
            "console",
            lambda message: found.errors.append(message.text) if message.type == "error" else None,
        )
        found.page.on("pageerror", lambda error: found.errors.append(str(error)))
        found.page.on(
            "request",
            lambda request: (
                found.requests.append(request.url)
                if not request.url.startswith(("data:", path.as_uri()))
                else None
            ),
        )
        found.page.goto(path.as_uri())
        return found

    yield opened
    for context in contexts:
        context.close()
