"""The programs of docs/examples, and the code that docs/own_loop.md and docs/interchange.md show,
run and do what they say.

Those for timm, Lightning, Hugging Face and cleanlab run in an environment with these (`make
test-loops`); FiftyOne is skipped where it is not installed.
"""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.datasets import ImageFolder

from tdds_dist.coreset.export import export
from tdds_dist.data.manifest import read_dataset
from tdds_dist.data.sources import open_source
from tdds_dist.data.writer import write_beton
from tdds_dist.distributed.partition import PADDING
from tdds_dist.runs.artifacts import Coreset, Scores, save_coreset, save_scores
from tdds_dist.scoring.trajectory import Trajectory
from tests.scoring.test_trajectory_table import record

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "docs/examples"
LOOPS = (
    "own_loop",
    "timm_loop",
    "lightning_loop",
    "pruning_loop",
    "pruning_timm",
    "pruning_lightning",
)
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# class folders whose natural order is another than their alphabetical one
SIZES = {"1": 3, "10": 4, "2": 5}
KEPT = np.array([0, 2, 3, 8, 11])


def example(name: str) -> SimpleNamespace:
    """An example as a module."""
    return SimpleNamespace(**runpy.run_path(str(EXAMPLES / f"{name}.py")))


def blocks_of(page: str, words: str) -> list[str]:
    """The blocks of Python code with these words that a page of the docs shows."""
    found = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), flags=re.DOTALL)
    return [block for block in found if words in block]


def pipelines() -> dict[str, list]:
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.transforms import ToTensor

    return {"image": [SimpleRGBImageDecoder(), ToTensor()], "label": [IntDecoder(), ToTensor()]}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of 12 grey images whose brightness is ten times their global index, as .beton, with
    scores and a coreset."""
    folder = tmp_path_factory.mktemp("images")
    index = 0
    for name, size in SIZES.items():
        (folder / "train" / name).mkdir(parents=True)
        for number in sorted(str(number) for number in range(8, 8 + size)):  # 10 before 8
            Image.new("RGB", (64, 64), (10 * index,) * 3).save(
                folder / "train" / name / f"{number}.png"
            )
            index += 1
    files = {
        name: folder / file
        for name, file in (
            ("beton", "train.beton"),
            ("coreset", "coreset.npz"),
            ("scores", "el2n.npz"),
            ("paths", "kept.txt"),
            ("subset", "kept.pt"),
            ("table", "scores.parquet"),
        )
    }
    write_beton(
        open_source(f"imagefolder:{folder}"),
        files["beton"],
        write_mode="raw",
        num_workers=1,
        progress=False,
    )
    dataset = read_dataset(files["beton"])
    save_coreset(
        files["coreset"],
        Coreset(KEPT, np.linspace(0.1, 0.9, 5, dtype=np.float32), "el2n", 0.6, dataset.fingerprint),
    )
    save_scores(
        files["scores"],
        Scores("el2n", np.arange(12, dtype=np.float32), dataset.label_N, dataset.fingerprint),
    )
    export(files["coreset"], "paths", files["paths"], beton=files["beton"])
    export(files["coreset"], "torch-subset", files["subset"])
    export(files["scores"], "parquet", files["table"], beton=files["beton"])
    return {"folder": folder, **files}


# ---- loops


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_is_short(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 60


@pytest.mark.loops
@pytest.mark.parametrize(("package", "num_samples"), [("timm", 1796), ("lightning", 1797)])
def test_the_loop_of_a_library_scores_every_image_once(package, num_samples, tmp_path):
    pytest.importorskip(package)
    done = subprocess.run(
        [sys.executable, *TORCHRUN, str(EXAMPLES / f"{package}_loop.py")],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    # end_epoch refuses what is recorded twice or not at all
    assert done.returncode == 0, done.stderr
    said = done.stdout.strip()
    assert re.fullmatch(
        rf"(?:loss [\d.]+; )?scored {num_samples} images; kept first: \[\d+(?:, \d+){{4}}\]", said
    ), said


@pytest.mark.loops
@pytest.mark.parametrize(
    ("package", "seen"), [("timm", "6292 of 10782"), ("lightning", "11686 of 21564")]
)
def test_the_loop_of_a_library_skips_images(package, seen, tmp_path):
    """All in the first epoch, 899 of 1,797 in each other; `end_epoch` counts them."""
    pytest.importorskip(package)
    command = [sys.executable, *TORCHRUN, str(EXAMPLES / f"pruning_{package}.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"saw {seen} images" in done.stdout


# ---- the index of one's own data


@pytest.mark.parametrize("num_samples", [97, 96])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_repeats_of_a_distributed_sampler_are_found(num_samples, world_size):
    """The two lines that docs/own_loop.md gives for torch's DistributedSampler."""
    from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

    (lines,) = blocks_of("own_loop.md", "world_size + rank")
    dataset = TensorDataset(torch.arange(num_samples))
    recorded: list[int] = []
    for rank in range(world_size):
        sampler = DistributedSampler(dataset, world_size, rank)
        loader = DataLoader(dataset, 8, sampler=sampler)
        for step, (index,) in enumerate(loader):
            names = {
                "torch": torch,
                "index": index,
                "step": step,
                "world_size": world_size,
                "rank": rank,
                "N": num_samples,
                "loader": loader,
            }
            exec(lines, names)
            recorded += names["index"].tolist()  # type: ignore[attr-defined]
    real = [index for index in recorded if index != PADDING]
    assert sorted(real) == list(range(num_samples))
    assert len(recorded) - len(real) == -num_samples % world_size


def test_the_wrapper_gives_any_dataset_its_index(images):
    (block,) = blocks_of("own_loop.md", "class Indexed")
    names = {
        "torch": torch,
        "torchvision": torchvision,
        "transform": torchvision.transforms.functional.pil_to_tensor,
    }
    exec(block.replace("DIR", str(images["folder"])), names)
    dataset = names["dataset"]
    assert len(dataset) == 12
    order = read_dataset(images["beton"])
    for image, label, index in torch.utils.data.DataLoader(dataset, batch_size=5, shuffle=True):
        assert index.dtype == torch.int64
        assert torch.equal(image[:, 0, 0, 0], 10 * index)  # the order is that of the .beton
        assert label.tolist() == order.label_N[index].tolist()


def test_an_ffcv_file_without_an_index_field_gives_the_index(images):
    """The lines of docs/own_loop.md, in a loop: every image comes with its own index, every epoch
    in another order."""
    from ffcv.loader import Loader, OrderOption

    (block,) = blocks_of("own_loop.md", "next_traversal_order")
    names = {
        "torch": torch,
        "Loader": Loader,
        "OrderOption": OrderOption,
        "beton": str(images["beton"]),
        "pipelines": pipelines(),
        "seen": [],
        "batch_size": 5,
        "epochs": 2,
    }
    exec(
        block.replace(
            "...", "seen.append((image[:, 0, 0, 0].tolist(), label.tolist(), index.tolist()))"
        ),
        names,
    )
    seen = names["seen"]
    assert isinstance(seen, list)
    assert len(seen) == 6
    value, label, order = (
        [item for batch in column for item in batch] for column in zip(*seen, strict=True)
    )
    assert value == [10 * index for index in order]
    assert label == read_dataset(images["beton"]).label_N[order].tolist()
    assert sorted(order[:12]) == sorted(order[12:]) == list(range(12))
    assert order[:12] != order[12:]


# ---- coresets elsewhere


def test_what_the_pages_show_is_what_is_tested():
    files = [path.read_text() for path in EXAMPLES.glob("*.py")]
    shown = blocks_of("interchange.md", "def ")
    assert len(shown) == 6
    for block in shown:
        assert any(block in text for text in files), block


def test_a_coreset_in_pytorch(images):
    dataset = ImageFolder(str(images["folder"] / "train"))
    subset, importance_N = example("coreset_torch").coreset_of(dataset, images["subset"])
    assert [image.getpixel((0, 0))[0] for image, _ in subset] == (10 * KEPT).tolist()
    assert torch.equal(importance_N.nonzero()[:, 0], torch.from_numpy(KEPT))
    assert torch.allclose(importance_N[KEPT], torch.linspace(0.1, 0.9, 5))
    with pytest.raises(AssertionError):
        example("coreset_torch").coreset_of(
            torch.utils.data.Subset(dataset, range(11)), images["subset"]
        )


def test_a_coreset_in_ffcv(images):
    loader = example("coreset_ffcv").loader_of(
        str(images["beton"]), str(images["coreset"]), 2, num_workers=1, pipelines=pipelines()
    )
    for _ in range(2):
        assert (
            sorted(value for image, _ in loader for value in image[:, 0, 0, 0].tolist())
            == (10 * KEPT).tolist()
        )


@pytest.mark.loops
@pytest.mark.parametrize("as_program", [False, True])
def test_a_coreset_in_timm(as_program, images):
    timm_data = pytest.importorskip("timm.data")
    if as_program:
        done = subprocess.run(
            [
                sys.executable,
                str(EXAMPLES / "coreset_timm.py"),
                str(images["folder"]),
                str(images["paths"]),
            ],
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("trained on 5 of 12 images; loss ")
        return
    dataset = timm_data.create_dataset(
        "", root=str(images["folder"]), split="train", is_training=True
    )
    by_index = [dataset[int(index)][0].getpixel((0, 0))[0] for index in KEPT]
    assert by_index != (10 * KEPT).tolist()  # why it goes by path: timm's order is another
    example("coreset_timm").keep(dataset, str(images["folder"]), str(images["paths"]))
    assert sorted(image.getpixel((0, 0))[0] for image, _ in dataset) == (10 * KEPT).tolist()
    assert dataset.reader.class_to_idx == {"1": 0, "2": 1, "10": 2}


@pytest.mark.loops
def test_a_coreset_in_hugging_face_datasets(images, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"value": list(range(12))})
    assert example("coreset_datasets").select(rows, images["coreset"])["value"] == KEPT.tolist()
    folder = datasets.load_dataset(
        "imagefolder", data_dir=str(images["folder"]), split="train", cache_dir=str(tmp_path)
    )
    kept = example("coreset_datasets").select_paths(
        folder, str(images["folder"]), str(images["paths"])
    )
    assert sorted(image.getpixel((0, 0))[0] for image in kept["image"]) == (10 * KEPT).tolist()


@pytest.mark.loops
def test_wrong_labels_by_cleanlab(tmp_path):
    pytest.importorskip("cleanlab")
    (table, _), _ = export(record(tmp_path / "trajectory"), "trajectory")
    quality = example("trajectory_cleanlab").label_quality(str(table), from_epoch=4)
    p_label_TN = Trajectory(tmp_path / "trajectory").read("p_label")[4:]
    assert quality.index.tolist() == [*range(p_label_TN.shape[1])]
    np.testing.assert_allclose(quality, p_label_TN.mean(axis=0), rtol=1e-5)


def test_scores_in_fiftyone(images, tmp_path):
    """With FiftyOne and its database where they run, else with the two methods that the example
    calls."""
    paths = [str(file) for file in sorted((images["folder"] / "train").rglob("*.png"))] + [
        str(tmp_path / "other.png")
    ]
    dataset = _fiftyone_dataset(paths)
    example("scores_fiftyone").add_scores(
        dataset,
        str(images["folder"]),
        str(images["table"]),
        ["el2n", "rank_el2n", "keep_el2n_p0.5"],
    )
    assert dataset.values("el2n") == [*np.arange(12.0), None]
    assert dataset.values("rank_el2n") == [*range(12, 0, -1), None]
    assert dataset.values("keep_el2n_p0_5") == [False] * 6 + [True] * 6 + [None]


def _fiftyone_dataset(paths: list[str]) -> object:
    try:
        import fiftyone

        dataset = fiftyone.Dataset()
        dataset.add_samples([fiftyone.Sample(filepath=path) for path in paths])
        return dataset
    except Exception:  # not installed, or its database does not run here
        return _Values({"filepath": paths})


class _Values:
    """`values` and `set_values` of fiftyone.Dataset."""

    def __init__(self, fields: dict[str, list]) -> None:
        self.fields = fields

    def values(self, field: str) -> list:
        return self.fields[field]

    def set_values(self, field: str, values: list) -> None:
        assert len(values) == len(self.fields["filepath"])
        assert "." not in field
        self.fields[field] = values
