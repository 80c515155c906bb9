"""The training loop: gradients of the global batch whatever the ranks, weights that recording does not touch."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from torch import nn

from tdds_dist import ShardedScorer, distributed, engine
from tdds_dist.beton import read_images
from tdds_dist.collect import Scoring
from tdds_dist.config import load_config
from tdds_dist.engine import fit
from tdds_dist.errors import InputError
from tdds_dist.job import Job, Nobody
from tdds_dist.partition import epoch_order
from tdds_dist.prepare import open_files
from tdds_dist.rundir import RunDir
from tdds_dist.schedule import learning_rate


def tiny_model(name, num_classes, **options):
    """A network without batch norm, so that the world size changes nothing but rounding."""
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(3 * 8 * 8, 32), nn.Tanh(), nn.Linear(32, num_classes))


def run_job(rank, config_file, overrides, run_dir, *, plain=True, score=False, model=None, **job_options):
    """Train on the config's files; returns (weights, result, metrics)."""
    if plain:
        engine.build_model = model or tiny_model
    config = load_config(config_file, [f"run.dir={run_dir}", *overrides])
    world = distributed.current_world("cpu")
    run = RunDir(run_dir)
    run.path.mkdir(exist_ok=True)
    train_file, val_file, _ = open_files(config)
    if score:
        windows = config.windows()
        job_options["observer"] = Scoring(ShardedScorer(train_file.num_samples, 10, windows, device="cpu"), False)
    job = Job(config, world, run, train_file, val_file, config.train.epochs, config.train.global_batch_size, **job_options)
    result = fit(job)
    if not world.is_main:
        return {}, result, []
    state = torch.load(run.models / "final.pt", weights_only=True)
    return {name: value.numpy() for name, value in state.items()}, result, run.read_metrics()


def one_rank(config_file, overrides, run_dir, **options):
    return run_ranks(1, _job_options, config_file, overrides, run_dir, options)[0]


def _job_options(rank, config_file, overrides, run_dir, options):
    return run_job(rank, config_file, overrides, run_dir, **options)


def assert_close(a, b, tolerance):
    for name, value in a.items():
        assert np.abs(value.astype(float) - b[name]).max() <= tolerance * max(1.0, np.abs(value).max()), name


pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("importance", ["none", "batch", "sample"])
def test_the_weights_do_not_depend_on_ranks_or_accumulation(config_file, tmp_path, importance):
    """120 images in batches of 36: the last step of an epoch is short, so padding matters too."""
    options = {"importance": importance, "importance_N": np.linspace(0.1, 2.0, 120).astype(np.float32)}
    base = ["train.global_batch_size=36", "train.epochs=2"]
    alone = one_rank(config_file, base, tmp_path / "w1", **options)
    for world_size, extra in [(2, []), (3, []), (1, ["train.accumulation=2"]), (2, ["train.accumulation=3"])]:
        name = f"w{world_size}{len(extra)}{importance}"
        weights, result, _ = run_ranks(world_size, _job_options, config_file, base + extra, tmp_path / name, options)[0]
        assert_close(alone[0], weights, 2e-5)
        assert result["final_loss"] == pytest.approx(alone[1]["final_loss"], rel=1e-4)


@pytest.mark.parametrize("importance", ["none", "batch", "sample"])
def test_one_epoch_against_a_literal_loop(config_file, tmp_path, importance):
    """SGD written out: mean over the batch's real rows, weighted as section 4.3 and the authors' code say."""
    importance_N = np.linspace(0.1, 2.0, 120).astype(np.float32)
    overrides = ["train.global_batch_size=36", "train.epochs=1", "data.crop=center", "train.label_smoothing=0.1"]
    weights, _, _ = one_rank(config_file, overrides, tmp_path / "run", importance=importance, importance_N=importance_N)

    config = load_config(config_file, overrides)
    images = torch.from_numpy(np.stack(read_images(config.data.train, range(120)))).permute(0, 3, 1, 2)
    label = torch.from_numpy(open_files(config)[0].label_N.astype(np.int64))
    torch.manual_seed(0)
    model = tiny_model("", 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9, nesterov=True, weight_decay=5e-4)
    order = epoch_order(120, 36)
    for step, index in enumerate(order.index_SG):
        batch = torch.from_numpy(index[index >= 0])
        loss_B = F.cross_entropy(
            model((images[batch].float() - 78.0) / 90.0), label[batch], reduction="none", label_smoothing=0.1
        )
        weight_B = torch.from_numpy(importance_N)[batch]
        loss = {"none": loss_B.mean(), "batch": loss_B.mean() * weight_B.mean(), "sample": (loss_B * weight_B).mean()}[
            importance
        ]
        optimizer.param_groups[0]["lr"] = learning_rate(step, 4, 0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # JPEG decoders differ by a few grey levels, hence the tolerance; a wrong weight is off by tens of percent.
    assert_close({k: v.numpy() for k, v in model.state_dict().items()}, weights, 2e-3)


def test_recording_leaves_the_weights_bitwise_alone(config_file, tmp_path):
    for world_size in (1, 2):
        runs = [
            run_ranks(
                world_size, _job_options, config_file, [], tmp_path / f"{world_size}{score}", {"plain": False, "score": score}
            )[0][0]
            for score in (False, True)
        ]
        assert all(np.array_equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_the_clean_view_leaves_the_weights_bitwise_alone(config_file, tmp_path):
    """Mixing draws random numbers and the network has batch norm: the extra pass must touch neither."""
    overrides = ["train.mixup=0.2", "train.cutmix=1.0", "score.view=clean", "train.epochs=3"]
    runs = [one_rank(config_file, overrides, tmp_path / str(score), plain=False, score=score)[0] for score in (False, True)]
    assert all(np.array_equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_metrics_and_result_of_a_run(config_file, tmp_path):
    _, result, metrics = one_rank(config_file, ["train.epochs=3", "train.eval_every=2"], tmp_path / "run", score=True)
    assert [record["epoch"] for record in metrics] == [0, 1, 2]
    assert ["val_top1" in record for record in metrics] == [False, True, True]  # the last epoch always
    assert result["steps"] == metrics[-1]["step"] == 15
    assert result["final_top1"] == metrics[-1]["val_top1"]
    assert result["best_top1"] == max(record["val_top1"] for record in metrics if "val_top1" in record)
    for record in metrics:
        assert 0 <= record["train_top1"] <= 100
        assert record["images_per_second"] > 0
        assert 0 < record["scoring_share"] < 1
    assert list((tmp_path / "run" / "tb").glob("events*"))
    json.dumps(result)


def test_evaluation_counts_each_image_once(config_file, tmp_path):
    """50 images in batches of 24 on 3 ranks; a model that always says 0 is right as often as there are zeros."""
    config = load_config(config_file)
    share = 100.0 * (open_files(config)[1].label_N == 0).mean()
    for world_size in (1, 3):
        options = {"model": constant_model}
        _, result, _ = run_ranks(
            world_size, _job_options, config_file, ["train.epochs=1", "train.lr=1e-30"], tmp_path / f"run{world_size}", options
        )[0]
        assert result["final_top1"] == pytest.approx(share)


def constant_model(name, num_classes, **options):
    linear = nn.Linear(3 * 32 * 32, num_classes)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    linear.bias.data[0] = 1.0
    return nn.Sequential(nn.Flatten(), linear)


def test_a_diverging_run_says_so_on_every_rank(config_file, tmp_path):
    outcomes = run_ranks(2, _diverge, config_file, tmp_path / "run")
    for kind, text in outcomes:
        assert kind == "NonFiniteLogitsError"
        assert "epoch 1, step" in text
        assert "global indices" in text
    for kind, text in run_ranks(2, _diverge, config_file, tmp_path / "unscored", False):
        assert kind == "InputError"
        assert "loss is not finite" in text


def _diverge(rank, config_file, run_dir, score=True):
    try:
        run_job(rank, config_file, ["train.lr=1e30", "train.log_every=1"], run_dir, score=score)
    except InputError as error:
        return type(error).__name__, str(error)
    return "", ""


def test_amsgrad_free_adamw_without_decay_on_norms(config_file):
    config = load_config(config_file, ["train.optimizer=adamw", "train.decay_norm_and_bias=false", "train.lr=0.001"])
    optimizer = engine.build_optimizer(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), config)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups] == [(1, 5e-4), (3, 0.0)]


def test_nobody_sees_nothing():
    nobody = Nobody()
    nobody.begin_epoch(epoch_order(3, 3), 0)
    assert nobody.state_dict() == {}
    assert nobody.end_epoch() is False


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet34", "resnet50", "swin_t", "vgg16_bn", "mobilenet_v2", "shufflenet_v2_x0_5"]
)
def test_networks_by_name(name):
    with torch.device("meta"):
        from tdds_dist.models import build_model

        model = build_model(name, 7, channels_last=False)
        assert model(torch.empty(2, 3, 224, 224)).shape == (2, 7)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "shufflenet_v2_x0_5"])
def test_the_cifar_stem_keeps_the_resolution(name):
    from tdds_dist.models import build_model

    model = build_model(name, 10, cifar_stem=True)
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    assert (first.kernel_size, first.stride, first.padding) == ((3, 3), (1, 1), (1, 1))
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    with pytest.raises(InputError, match="cifar_stem"):
        build_model("swin_t", 10, cifar_stem=True)
    with pytest.raises(InputError, match="not a torchvision classifier"):
        build_model("resnet19", 10)


def test_splits_of_two_datasets_are_named_as_that(config_file, betons):
    """Neither number of classes is wrong by itself, so changing data.num_classes would lead in a circle."""
    with pytest.raises(InputError, match=r"data\.train=.* has 10 classes, data\.val=.*raw\.beton 5; give two splits of one"):
        open_files(load_config(config_file, [f"data.val={betons['raw']}"]))
    assert open_files(load_config(config_file))[2].num_classes == 10
