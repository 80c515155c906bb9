"""The training loop: gradients of the global batch whatever the ranks, weights that recording does
not touch."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tdds_dist import ShardedScorer
from tdds_dist.config.run import load_config
from tdds_dist.data import beton
from tdds_dist.data.beton import read_images
from tdds_dist.data.manifest import manifest_path
from tdds_dist.data.sources import open_source
from tdds_dist.data.writer import write_beton
from tdds_dist.distributed import world as distributed
from tdds_dist.distributed.partition import epoch_order
from tdds_dist.runs.directory import RunDir
from tdds_dist.runs.status import Pulse
from tdds_dist.training import engine
from tdds_dist.training.build import build_model, on_this_node, open_files
from tdds_dist.training.collect import collect, observed
from tdds_dist.training.engine import fit
from tdds_dist.training.schedule import learning_rate
from tdds_dist.training.training import Training
from tests.make import refused
from tests.ranks import catch, run_ranks


def tiny_model(name, num_classes, **options):
    """A network without batch norm, so that the world size changes nothing but rounding."""
    return nn.Sequential(
        nn.AvgPool2d(4),
        nn.Flatten(),
        nn.Linear(3 * 8 * 8, 32),
        nn.Tanh(),
        nn.Linear(32, num_classes),
    )


def train(rank, config_file, run_dir, calls):
    """Train on the config's files, once per (overrides, options); on rank 0 (weights, result,
    metrics) of each."""
    return [
        train_once(config_file, overrides, run_dir / str(number), **options)
        for number, (overrides, options) in enumerate(calls)
    ]


def train_once(config_file, overrides, run_dir, *, model=tiny_model, score=False, **job_options):
    engine.build_model = model
    config = load_config(config_file, [f"run.dir={run_dir}", *overrides])
    world = distributed.current_world("cpu")
    run = RunDir(run_dir)
    run.path.mkdir(parents=True, exist_ok=True)
    train_file, val_file, _ = open_files(config)
    training = Training(
        config,
        world,
        run,
        train_file,
        val_file,
        config.train.epochs,
        config.train.global_batch_size,
        **job_options,
    )
    result = fit(
        observed(
            training, ShardedScorer(train_file.num_samples, 10, config.windows(), device="cpu")
        )
        if score
        else training
    )
    if not world.is_main:
        return {}, result, []
    state = torch.load(run.models / "final.pt", weights_only=True)
    return {name: value.numpy() for name, value in state.items()}, result, run.read_metrics()


def trained(world_size, config_file, run_dir, *calls):
    return run_ranks(world_size, train, config_file, run_dir / f"on{world_size}", calls)[0]


def assert_close(a, b, tolerance):
    for name, value in a.items():
        assert np.abs(value.astype(float) - b[name]).max() <= tolerance * max(
            1.0, np.abs(value).max()
        ), name


pytestmark = pytest.mark.distributed


IMPORTANCE_N = np.linspace(0.1, 2.0, 120).astype(np.float32)
IMPORTANCES = ("none", "batch", "sample")
# of 120 images: the last step of an epoch is short, so padding matters too
BATCH = "train.global_batch_size=36"


def weighted(*overrides):
    """Calls of `train`, one per kind of importance."""
    return [
        ([BATCH, *overrides], {"importance": kind, "importance_N": IMPORTANCE_N})
        for kind in IMPORTANCES
    ]


def test_the_weights_do_not_depend_on_ranks_or_accumulation(config_file, tmp_path):
    alone = trained(
        1,
        config_file,
        tmp_path,
        *weighted("train.epochs=2"),
        *weighted("train.epochs=2", "train.accumulation=2"),
    )
    others = [
        *alone[3:],
        *trained(2, config_file, tmp_path, *weighted("train.epochs=2", "train.accumulation=3")),
        *trained(3, config_file, tmp_path, *weighted("train.epochs=2")),
    ]
    for number, (weights, result, _) in enumerate(others):
        assert_close(alone[number % 3][0], weights, 2e-5)
        assert result["final_loss"] == pytest.approx(alone[number % 3][1]["final_loss"], rel=1e-4)


def test_one_epoch_against_a_literal_loop(config_file, tmp_path):
    """SGD written out: mean over the batch's real rows, weighted as section 4.3 and the authors'
    code say."""
    overrides = ["train.epochs=1", "data.crop=center", "train.label_smoothing=0.1"]
    config = load_config(config_file, [BATCH, *overrides])
    images = torch.from_numpy(np.stack(read_images(config.data.train, range(120)))).permute(
        0, 3, 1, 2
    )
    label = torch.from_numpy(open_files(config)[0].label_N.astype(np.int64))
    for importance, (weights, *_) in zip(
        IMPORTANCES, trained(1, config_file, tmp_path, *weighted(*overrides)), strict=True
    ):
        torch.manual_seed(0)
        model = tiny_model("", 10)
        optimizer = torch.optim.SGD(
            model.parameters(), lr=1.0, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
        for step, index in enumerate(epoch_order(120, 36).of_rank(0, 1)[1]):
            batch = torch.from_numpy(index[index >= 0])
            logits = model((images[batch].float() - 78.0) / 90.0)
            loss_B = F.cross_entropy(logits, label[batch], reduction="none", label_smoothing=0.1)
            weight_B = torch.from_numpy(IMPORTANCE_N)[batch]
            losses = {
                "none": loss_B.mean(),
                "batch": loss_B.mean() * weight_B.mean(),
                "sample": (loss_B * weight_B).mean(),
            }
            optimizer.param_groups[0]["lr"] = learning_rate(step, 4, 0.05)
            optimizer.zero_grad()
            losses[importance].backward()
            optimizer.step()
        # JPEG decoders differ by a few grey levels, hence the tolerance; a wrong weight is off by
        # tens of percent.
        assert_close({k: v.numpy() for k, v in model.state_dict().items()}, weights, 2e-3)


def test_whose_steps_the_learning_rate_spans(config_file, tmp_path):
    """50 of 120 images in batches of 36: 2 steps per epoch on them, 4 on all; the first epoch warms
    up."""
    overrides = [BATCH, "train.epochs=3", "train.warmup_epochs=1", "train.lr=0.1"]
    calls = [
        ([*overrides, f"retrain.schedule_of={of}"], {"subset_M": np.arange(50)})
        for of in ("coreset", "full")
    ]
    found = [
        [record["lr"] for record in metrics]
        for *_, metrics in trained(1, config_file, tmp_path, *calls)
    ]
    assert found == [
        pytest.approx(
            [learning_rate(step, 3 * of_epoch, 0.1, warmup_steps=of_epoch) for step in (1, 3, 5)],
            abs=1e-12,
        )
        for of_epoch in (2, 4)  # the second ends in the middle of it
    ]


def test_recording_leaves_the_weights_bitwise_alone(config_file, tmp_path):
    """Also from the clean view: mixing draws random numbers and the network has batch norm, which
    it must not touch."""
    short = ["train.epochs=2", "score.windows=[{T: 2, K: 2}]"]
    clean = [*short, "train.mixup=0.2", "train.cutmix=1.0", "score.view=clean"]
    calls = [
        (overrides, {"model": build_model, "score": score})
        for overrides in (short, clean)
        for score in (False, True)
    ]
    for world_size, first in ((1, 2), (3, 0)):
        plain, scored = trained(world_size, config_file, tmp_path, *calls[first : first + 2])
        assert plain[0].keys() == scored[0].keys()
        assert all(np.array_equal(plain[0][name], scored[0][name]) for name in plain[0])


def test_metrics_and_result_of_a_run(config_file, tmp_path):
    _, result, metrics = trained(
        1, config_file, tmp_path, (["train.epochs=3", "train.eval_every=2"], {"score": True})
    )[0]
    assert [record["epoch"] for record in metrics] == [0, 1, 2]
    # the last epoch always
    assert ["val_top1" in record for record in metrics] == [False, True, True]
    assert result["steps"] == metrics[-1]["step"] == 15
    assert result["final_top1"] == metrics[-1]["val_top1"]
    assert result["best_top1"] == max(
        record["val_top1"] for record in metrics if "val_top1" in record
    )
    for record in metrics:
        assert 0 <= record["train_top1"] <= 100
        assert record["images_per_second"] > 0
        assert 0 < record["scoring_share"] < 1
    assert list((tmp_path / "on1" / "0" / "tb").glob("events*"))
    json.dumps(result)


def test_evaluation_counts_each_image_once(config_file, tmp_path):
    """50 images in batches of 24 on 3 ranks; a model that always says 0 is right as often as there
    are zeros, and on no other class."""
    config = load_config(config_file)
    share = 100.0 * (open_files(config)[1].label_N == 0).mean()
    result = trained(
        3, config_file, tmp_path, (["train.epochs=1", "train.lr=1e-30"], {"model": constant_model})
    )[0][1]
    assert result["final_top1"] == pytest.approx(share)
    classes = RunDir(tmp_path / "on3" / "0").read_val_classes()
    assert classes.epoch_E.tolist() == [0]
    of_all = math.log(math.e + 9)
    np.testing.assert_allclose(classes.loss_EC, [[of_all - 1] + [of_all] * 9], rtol=1e-4)
    assert classes.recall_EC.tolist() == [[1.0] + [0.0] * 9]


def constant_model(name, num_classes, **options):
    linear = nn.Linear(3 * 32 * 32, num_classes)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    linear.bias.data[0] = 1.0
    return nn.Sequential(nn.Flatten(), linear)


def test_a_diverging_run_says_so_on_every_rank(config_file, tmp_path):
    for scored, unscored in run_ranks(2, _diverge, config_file, tmp_path):
        assert scored[0] == "NonFiniteLogitsError"
        assert "epoch 1, step" in scored[1]
        assert "global indices" in scored[1]
        assert unscored[0] == "InputError"
        assert "loss is not finite" in unscored[1]


def _diverge(rank, config_file, folder):
    overrides = ["train.lr=1e30", "train.log_every=1"]
    return [
        catch(
            lambda score=score: train_once(config_file, overrides, folder / str(score), score=score)
        )
        for score in (True, False)
    ]


def test_amsgrad_free_adamw_without_decay_on_norms(config_file):
    config = load_config(
        config_file, ["train.optimizer=adamw", "train.decay_norm_and_bias=false", "train.lr=0.001"]
    )
    optimizer = engine.build_optimizer(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), config)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups] == [
        (1, 5e-4),
        (3, 0.0),
    ]


def test_networks_by_name():
    with torch.device("meta"):
        small = ["resnet18", "mobilenet_v2", "shufflenet_v2_x0_5"]
        for name in (*small, "resnet34", "resnet50", "swin_t", "vgg16_bn"):
            model = build_model(name, 7, channels_last=False)
            assert model(torch.empty(2, 3, 224, 224)).shape == (2, 7)
        # the CIFAR stem keeps the resolution
        for name in small:
            model = build_model(name, 10, cifar_stem=True, channels_last=False)
            first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
            assert (first.kernel_size, first.stride, first.padding) == ((3, 3), (1, 1), (1, 1))
            assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
        # 13 convolutions of 3x3 with batch norm, and one linear layer, as VGG-16 is used on CIFAR
        model = build_model("vgg16_bn", 10, cifar_stem=True, channels_last=False)
        widths = [64, 64, 128, 128, *[256] * 3, *[512] * 6]
        inputs = [3, *widths[:-1]]
        num = sum(9 * a * b + 3 * b for a, b in zip(inputs, widths, strict=True)) + 513 * 10
        assert sum(parameter.numel() for parameter in model.parameters()) == num
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    refused("cifar_stem", build_model, "swin_t", 10, cifar_stem=True)
    refused("not a torchvision classifier", build_model, "resnet19", 10)


def test_splits_of_two_datasets_are_named_as_that(tmp_path, config_file, betons):
    """Neither number of classes is wrong by itself, so changing data.num_classes would lead in a
    circle."""
    config = load_config(config_file, [f"data.val={betons['raw']}"])
    of_two = r"raw\.beton have other classes \(10 and 5 of them\); give two splits of one"
    refused(of_two, open_files, config)
    config = load_config(config_file)
    assert open_files(config)[2].num_classes == 10
    val = tmp_path / "val.beton"
    shutil.copy(config.data.val, val)
    record = json.loads(manifest_path(Path(config.data.val)).read_bytes())
    record["class_names"][2:4] = ["other", "names"]
    manifest_path(val).write_text(json.dumps(record))
    config = load_config(config_file, [f"data.val={val}"])
    of_two = r"label 2 is '2' in the first and 'other' in the second\); give two splits"
    refused(of_two, open_files, config)


def test_training_reads_the_copies_on_the_nodes_disk(config_file, tmp_path, monkeypatch):
    monkeypatch.setenv("NODE_DISK", str(tmp_path / "disk"))
    plain = load_config(config_file)
    cached = load_config(config_file, ["data.cache=$NODE_DISK/betons"])
    files = open_files(plain)[:2]
    world = distributed.current_world("cpu")
    assert on_this_node(plain, files, world) == [*files]
    pulse, states = Pulse(tmp_path / "status.json", "collect", 1, is_main=True), []
    monkeypatch.setattr(pulse, "beat", states.append)
    for there, here in zip(files, on_this_node(cached, files, world, pulse), strict=True):
        assert here.path.parent == tmp_path / "disk" / "betons"
        assert here.path.read_bytes() == there.path.read_bytes()
    assert (states[0], states[-1]) == ("copying", "starting")
    # the variable is one of the node that trains, not of the one that submits
    assert cached.data.cache == "$NODE_DISK/betons"


def test_a_class_may_be_in_one_split_only_and_no_message_leads_back(tmp_path, config_file, caplog):
    """Three classes in training, a fourth in evaluation; with and without manifests."""
    source = open_source("synthetic:40,4,16")
    few = np.flatnonzero(source.label_N < 3)
    train = replace(
        source,
        class_names=source.class_names[:3],
        path=[source.path[i] for i in few],
        label_N=source.label_N[few],
        reader=lambda i: source.read(int(few[i])),
    )
    files = {"train": tmp_path / "a.beton", "val": tmp_path / "b.beton"}
    for split, images in (("train", train), ("val", open_source("synthetic:40,4,16", "val"))):
        write_beton(images, files[split], num_workers=1, progress=False)

    def opened(num_classes):
        paths = [f"data.{split}={path}" for split, path in files.items()]
        config = load_config(config_file, [*paths, f"data.num_classes={num_classes}"])
        open_files(config, decode_some=True)

    manifest_path(files["val"]).unlink()
    refused(r"label 3, but the other split has 3 classes .*write this", opened, 3)
    refused(r"has 3 classes; set data.num_classes=3", opened, 4)
    manifest_path(files["train"]).unlink()
    refused(r"label 3, outside \[0, 3\).*; set data.num_classes", opened, 3)
    refused(r"has 4 classes; set data.num_classes=4", opened, 5)
    opened(4)
    (warning,) = caplog.messages
    assert "has no image of 1 of 4 classes (3); no network learns them" in warning


@pytest.mark.parametrize(
    ("num_shared", "with_crc"), [(0, True), (1, True), (100, True), (0, False), (100, False)]
)
def test_evaluation_on_training_images_is_said(tmp_path, config_file, caplog, num_shared, with_crc):
    train, other = open_source("synthetic:200,2,16"), open_source("synthetic:200,2,16", "val")
    of = [train] * num_shared + [other] * (100 - num_shared)
    val = replace(
        train,
        path=[source.path[i] for i, source in enumerate(of)],
        label_N=train.label_N[:100],
        reader=lambda i: of[i].read(i),
    )
    files = {"train": tmp_path / "a.beton", "val": tmp_path / "b.beton"}
    for source, file in zip((train, val), files.values(), strict=True):
        write_beton(source, file, num_workers=1, progress=False)
        if not with_crc:
            record = json.loads(manifest_path(file).read_bytes())
            del record["columns"]["crc32"]
            manifest_path(file).write_text(json.dumps(record))
    paths = [f"data.{split}={path}" for split, path in files.items()]
    open_files(load_config(config_file, [*paths, "data.num_classes=2"]), decode_some=True)
    said = [f"{num_shared} of the 100 images of data.val="] * (num_shared > 0)
    assert len(caplog.messages) == len(said)
    assert all(part in message for part, message in zip(said, caplog.messages, strict=True))


def inspected(rank, config_file, run_dir):
    """The names of the files that a collection inspects, final pass included."""
    names, read_fields = [], beton._read_fields
    beton._read_fields = lambda path, *rest: (names.append(path.name), read_fields(path, *rest))[1]
    config = load_config(
        config_file, [f"run.dir={run_dir}", "train.epochs=2", "score.windows=[{T: 2, K: 2}]"]
    )
    collect(config, distributed.current_world("cpu"))
    return names


def test_a_collection_inspects_each_file_once(config_file, tmp_path, betons):
    assert run_ranks(1, inspected, config_file, tmp_path / "run")[0] == [
        betons["train"].name,
        betons["val"].name,
    ]
