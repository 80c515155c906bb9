"""The paper's numbers: all of them are there, each is found for what it is of, and for nothing else."""

import hashlib
import re
from collections import Counter
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from tdds_dist.config.experiment import load_experiment
from tdds_dist.config.run import load_config
from tdds_dist.data.corruptions import KINDS
from tdds_dist.report import published
from tdds_dist.report.published import (
    Images,
    Printed,
    footnotes,
    images_of,
    lookup,
    paper_rows,
    printed_tables,
)
from tests.make import manifest_of, write_header

# by the paper's name
NETWORKS = {
    "resnet18": {"name": "resnet18", "cifar_stem": True},
    "resnet34": {"name": "resnet34", "cifar_stem": False},
    "resnet50": {"name": "resnet50", "cifar_stem": True},
    "swin_t": {"name": "swin_t", "cifar_stem": False},
    "vgg16": {"name": "vgg16_bn", "cifar_stem": True},
    "mobilenet_v2": {"name": "mobilenet_v2", "cifar_stem": True},
    "shufflenet_v2": {"name": "shufflenet_v2_x1_0", "cifar_stem": True},
}
# as the paper's section 5 has them, by pruning rate
WINDOWS = {
    "CIFAR-10": "0.3 T70_K10, 0.5 T90_K10, 0.7 T80_K10, 0.8 T30_K10, 0.9 T10_K5",
    "CIFAR-100": "0.3 T90_K10, 0.5 T70_K10, 0.7 T60_K20, 0.8 T20_K10, 0.9 T10_K5",
    "resnet34": "0.7 T30_K20, 0.8 T30_K20, 0.9 T30_K20",
    "swin_t": "0.25 T200_K10, 0.3 T180_K10, 0.4 T150_K10, 0.5 T100_K10",
}


def key_of(row: Printed) -> str:
    """What `Coreset.method` says of a row's coresets."""
    of = WINDOWS.get(row.dataset) or WINDOWS.get(row.score_network, "")
    window = dict(pair.split() for pair in of.split(", ")).get(str(row.pruning_rate))
    tdds = f"tdds_official_{window}_beta0.9"
    return {"tdds": tdds, "el2n_outer": f"{tdds}_el2n", "ccs": "ccs_aum"}.get(
        row.method, row.method
    )


def found(row: Printed, **changes: object) -> Printed | None:
    """What is found for a training like that of a row, but for `changes`."""
    given = {
        "images": row.images,
        "score_model": NETWORKS[row.score_network],
        "train_model": NETWORKS[row.train_network],
        "key": key_of(row),
        "pruning_rate": row.pruning_rate,
        "strategy": row.strategy or "E",
        "batch_size": row.batch_size,
        "importance": "batch" if row.method in ("tdds", "el2n_outer") else "none",
    }
    return lookup(**(given | changes))


def row_of(table: int, method: str = "tdds", rate: float = 0.7, network: str = "") -> Printed:
    return next(
        row
        for row in paper_rows()
        if (row.table, row.method, row.pruning_rate) == (table, method, rate)
        and network in ("", row.train_network)
    )


def test_every_number_of_the_paper_is_there():
    """The file is the one that was compared with the paper; a table lost or a digit changed shows."""
    content = (files("tdds_dist.report") / "paper.csv").read_bytes()
    assert hashlib.sha256(content).hexdigest() == (
        "e4d779421e4097a45f671f4170cd70bda48f5bfa423bd78abfdc0403e5be0fb9"
    )
    cells = Counter(row.table for row in paper_rows())
    assert cells == {1: 82, 2: 48, 3: 22, 4: 21, 5: 15, 6: 64, 7: 108, 8: 108, 9: 46, 10: 46}


@pytest.mark.parametrize("table", range(1, 11))
def test_every_number_is_found(table):
    """Where several tables print the same setting, in the first of them: Tables 5 and 6 repeat
    numbers of Table 1, three of them with another last digit."""
    rows = [row for row in paper_rows() if row.table == table]
    for row in rows:
        number = found(row)
        assert number is not None, row
        if table in (5, 6) and number.table == 1:
            assert number.top1 == pytest.approx(row.top1, abs=0.011)
        else:
            assert number is row
    if table >= 7:
        assert all(found(row, strategy="P") is row for row in rows if row.method != "full")


OTHER = {
    "images": [None, Images("CIFAR-10", "wrong labels"), Images("ImageNet-1K")],
    "score_model": [NETWORKS["resnet50"], {"name": "resnet18", "cifar_stem": False}, {}],
    "train_model": [
        NETWORKS["swin_t"],
        {"name": "vgg16_bn", "cifar_stem": False},
        {"name": "vgg16", "cifar_stem": True},
        {"name": "shufflenet_v2_x0_5", "cifar_stem": True},
        {"name": "resnet18"},
        {},
    ],
    "batch_size": [127, 16, None],
    "importance": ["none", "sample", None],
    "pruning_rate": [0.71, 0.1, None],
    "key": [
        "tdds_paper_T80_K10_beta0.9",
        "tdds_official_T80_K10_beta0.8",
        "tdds_official_T80_K10_beta0.9_ce",
        "tdds_official_T80_K10_beta0.9_balanced",
        "tdds_official_T81_K10_beta0.9",
        "tdds_official_T80_K11_beta0.9",
        "ccs_tdds_official_T80_K10_beta0.9",
        "el2n_T20",
        "ccs_el2n",
        "aum_probability",
        "ccs_aum_strata20",
        "dual",
        "?",
        "",
    ],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in OTHER.items() for value in values]
)
@pytest.mark.parametrize("table", [1, 2, 5, 7, 9, 10])
def test_no_number_for_another_setting(table, name, value):
    row = row_of(table, "el2n_outer" if table == 5 else "tdds")
    assert found(row, **{name: value}) is None


def test_a_strategy_has_its_own_numbers():
    assert found(row_of(1, rate=0.9), strategy="P") is None
    assert found(row_of(1), strategy="P") is row_of(2)
    assert found(row_of(2), strategy="E") is row_of(1)
    assert found(row_of(3), strategy="P") is None


def test_a_batch_has_its_own_numbers():
    """Table 6: 128 against 64 at 80 %."""
    half = row_of(1, rate=0.8)
    assert (half.batch_size, found(half).table) == (64, 1)
    assert found(half, batch_size=128).table == 6
    assert found(half, batch_size=32) is None


@pytest.mark.parametrize(
    ("name", "num_classes", "num_images", "expected"),
    [
        ("cifar10_train.beton", 10, None, "CIFAR-10"),
        ("data/CIFAR-100/train.beton", 100, 50_000, "CIFAR-100"),
        ("cifar100.beton", 10, None, "CIFAR-10"),  # the number of classes decides
        ("cifar10.beton", 10, 49_999, None),
        ("imagenet.beton", 1000, 1_281_167, "ImageNet-1K"),
        ("imagenette.beton", 10, None, None),
        ("imagenet100.beton", 100, None, None),
        ("digits.beton", 10, None, None),
    ],
)
def test_images_of_the_paper(name, num_classes, num_images, expected):
    found = images_of(name, num_classes, None, num_images)
    assert found == (expected and Images(expected))


def noisy(tmp_path, monkeypatch, num_wrong: int = 0, corruption: list[str] | None = None):
    """Which images of the paper 200 with noise are taken for, the whole of CIFAR-10 being 200."""
    monkeypatch.setitem(published.DATASETS, "cifar10", ("CIFAR-10", 200, 10))
    path, label_N = tmp_path / "train.beton", np.arange(200) % 10
    true_N = np.where(np.arange(200) < num_wrong, (label_N + 1) % 10, label_N)
    write_header(
        path, label_N, 10, true_N if num_wrong else None, corruption, source="cifar10:/data"
    )
    return images_of(str(path), 10, manifest_of(path))


@pytest.mark.parametrize(
    ("num_wrong", "corrupted", "expected"),
    [
        (0, None, ""),
        (40, None, "wrong labels"),
        (39, None, None),
        (80, None, None),
        (0, [*KINDS] * 8, "corrupted images"),
        (0, [*KINDS] * 7, None),
        (0, ["fog"] * 40, None),
        (0, [KINDS[0]] * 9 + [KINDS[1]] * 7 + [*KINDS[2:]] * 8, None),
        (40, [*KINDS] * 8, None),
        (40, [""], None),
    ],
)
def test_noise_of_the_paper(tmp_path, monkeypatch, num_wrong, corrupted, expected):
    corruption = None if corrupted is None else corrupted + [""] * (200 - len(corrupted))
    images = noisy(tmp_path, monkeypatch, num_wrong, corruption)
    assert images == (None if expected is None else Images("CIFAR-10", expected))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([row_of(1)], []),
        ([row_of(1), None, row_of(9, "full", 0)], []),
        ([row_of(3)], []),
        ([row_of(3, rate=0.9)], ["section 5.1"]),
        ([row_of(5, "el2n_outer", 0.8)], ["1.80 from 58.21 to 63.01, which is 4.80"]),
        ([row_of(5, "el2n_outer", 0.9)], []),
        ([row_of(7, network="resnet50")], ["name no strategy", "ResNet-18 with Strategy-P"]),
        ([row_of(8, network="resnet50")], ["name no strategy"]),
        ([row_of(8, network="vgg16")], ["name no strategy", "with batch norm"]),
        ([row_of(9)], ["name no strategy"]),
        ([row_of(10), row_of(1)], ["name no strategy"]),
    ],
)
def test_footnotes_of_what_is_shown(rows, words):
    source, *notes = footnotes(rows)
    assert source.startswith("Published: Table")
    assert len(notes) == len(words)
    for note, part in zip(notes, words, strict=True):
        assert part in note


def test_oddities_are_as_the_footnotes_say():
    assert footnotes([None]) == []
    same = [
        (row.top1, found(row, train_model=NETWORKS["resnet18"], strategy="P"))
        for row in paper_rows()
        if (row.table, row.train_network) == (7, "resnet50")
    ]
    pairs = [(top1, table_2.top1) for top1, table_2 in same if table_2 is not None]
    assert len(pairs) == 8 * 3  # all but Dyn-Unc
    assert all(ours == theirs for ours, theirs in pairs)
    assert (row_of(5, "el2n_outer", 0.8).top1, row_of(5, rate=0.8).top1) == (58.21, 63.01)


def test_tables_of_what_is_shown():
    (one,) = printed_tables([row_of(9, rate=0.3), row_of(9, "full", 0), None])
    assert one.title == "Table 9: CIFAR-100, 20 % corrupted images, resnet18, full data 75.30"
    assert one.columns == ["30 %", "50 %", "70 %", "80 %", "90 %"]
    assert [number.text for number in one.lines["tdds"]][:2] == ["75.40 ± 0.12", "72.49 ± 0.22"]
    six, seven = printed_tables([row_of(7, network="vgg16"), row_of(6, rate=0.8)])
    assert six.title == "Table 6: CIFAR-10, resnet18, Strategy-E"
    assert six.columns == ["80 %, batch 128", "80 %, batch 64", "90 %, batch 128", "90 %, batch 32"]
    assert [number.top1 for number in six.lines["random"]] == [86.92, 88.87, 76.71, 83.77]
    assert seven.title == "Table 7: CIFAR-10, resnet18, trained on vgg16"
    assert printed_tables([]) == []


CONFIGS = Path(__file__).parents[2] / "configs" / "experiments"


@pytest.mark.parametrize(
    "path", sorted(CONFIGS.glob("table*.yaml")), ids=lambda path: path.stem.partition("_")[0]
)
def test_headers_of_configs_repeat_the_paper(path, monkeypatch):
    """Lines such as `TDDS vgg16 94.45 93.74 91.34` under `Published, ... p = .3/.5/.7 (full 95.23`."""
    monkeypatch.chdir(CONFIGS.parents[1])
    plan = load_experiment(path)
    config = load_config(plan.config, plan.overrides)
    table = int(re.match(r"table(\d+)_", path.name)[1])
    head, _, rest = path.read_text().partition("\n# Published")
    assert f"# The paper's Table {table} (arXiv 2311.13613)" in head
    dataset = images_of(config.data.train, config.data.num_classes).dataset
    numbers = [row for row in paper_rows() if (row.table, row.dataset) == (table, dataset)]
    rates = [float(rate) for rate in re.search(r"p = ([./\d]+)", rest)[1].split("/")]
    assert rates == [*plan.pruning_rates] == sorted({row.pruning_rate for row in numbers} - {0})
    assert {method.name for method in plan.methods} == {row.method for row in numbers} - {"full"}
    (full,) = {
        row.top1
        for row in paper_rows()
        if (row.method, row.dataset, row.train_network, row.images.noise)
        == ("full", dataset, config.model.name, numbers[0].images.noise)
    }
    assert f"full {full:.2f}" in rest
    lines = re.findall(r"\n#   (\w+) +(?:([a-z]\w+|[\d/]+) +)?((?:[ \d]\d\.\d\d ?)+)(?=\n)", rest)
    assert {"tdds", "random"} <= {name.lower() for name, _, _ in lines} or table == 5
    for name, what, values in lines:
        for rate, value in zip(rates, values.split(), strict=True):
            assert [
                row
                for row in numbers
                if (row.method, row.pruning_rate, row.top1) == (name.lower(), rate, float(value))
                and (
                    not what or what == row.train_network or str(row.batch_size) in what.split("/")
                )
            ], (name, what, rate, value)
