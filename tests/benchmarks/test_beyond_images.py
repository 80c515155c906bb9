"""`benchmarks.beyond_images` trains every cell once; what is finished is left as it is."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.beyond_images import CELLS, main

pytestmark = pytest.mark.slow


def test_what_is_missing_is_trained_as_before_and_the_rest_is_left(tmp_path: Path) -> None:
    def measured() -> dict[str, list[float]]:
        tiny = f"--sets wine --seeds 2 --epochs 5 --work {tmp_path} --out {tmp_path} --name tiny"
        assert main(tiny.split()) == 0
        result: dict[str, Any] = json.loads((tmp_path / "beyond_images_tiny.json").read_text())
        top1: dict[str, list[float]] = result["top1_of_seeds"]
        return top1

    first = measured()
    assert set(first) == {f"wine {cell}" for cell in CELLS}
    assert min(first["wine all"]) > 80
    folder = tmp_path / "wine_epochs5_seed1"
    (folder / "tdds_p0.5.json").unlink()
    left = folder / "aum_p0.8.json"
    left.write_text(json.dumps(json.loads(left.read_text()) | {"top1": 12.5}))
    assert measured() == first | {"wine aum_p0.8": [first["wine aum_p0.8"][0], 12.5]}
