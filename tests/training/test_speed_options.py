"""What makes training faster and must not make it another: compiled networks, fused optimizers,
images that grow, and decoding ahead of need."""

import copy
import json
import threading
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch._inductor.config
from torch import nn

from tdds_dist import ShardedScorer
from tdds_dist.config.run import load_config, parse_config, to_dict
from tdds_dist.data.loader import THREAD_NAME, BetonLoader
from tdds_dist.distributed import collectives
from tdds_dist.distributed import world as distributed
from tdds_dist.distributed.interruption import Preempted
from tdds_dist.runs.checkpoint import Checkpoints
from tdds_dist.runs.directory import RunDir
from tdds_dist.training import engine, state
from tdds_dist.training.build import (
    InputStage,
    build_optimizer,
    open_files,
    preflight,
    set_deterministic,
)
from tdds_dist.training.collect import observed
from tdds_dist.training.engine import Trainer, fit
from tdds_dist.training.schedule import training_size, training_sizes
from tdds_dist.training.training import Training
from tests.make import refused
from tests.ranks import catch, run_ranks

# Without it every process that compiles starts helpers, and tries all instruction sets of the CPU in
# programs that load torch.
QUICK_COMPILER = {"compile_threads": 1, "cpp.vec_isa_ok": True}
GROWING = [
    "data.crop=resized",
    "data.progressive={start_size: 16, from_epoch: 0, to_epoch: 3, multiple: 8}",
    "train.epochs=5",
]


def on_cuda(function):
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.cuda(pytest.mark.distributed(skip(function)))


class Small(nn.Module):
    """Batch norm, and any image size; notes what it is shown when it is not compiled."""

    def __init__(self, seen):
        super().__init__()
        # A bias before batch norm has no gradient but rounding, which Adam would make steps of.
        self.conv, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 10)
        self.seen = seen

    def forward(self, image):
        if not torch.compiler.is_compiling():
            self.seen(self.training, tuple(image.shape))
        return self.head(torch.relu(self.norm(self.conv(image))).mean(dim=(2, 3)))


class Leaves:
    """Asks the run to leave at a forward pass, as a signal would, or fails there."""

    def __init__(self, interruption, at, error=None):
        self._interruption, self._left, self._error = interruption, at, error

    def record(self, index_B, logits_BC, label_B):
        self._left -= 1
        if self._left == 0 and self._error is not None:
            raise self._error
        if self._left == 0:
            self._interruption._first = "SIGTERM"

    def state_dict(self):
        return {}

    def _nothing(self, *arguments):
        """What there is no use for here."""

    expect = check = end_epoch = load_state_dict = _nothing


def train(
    rank,
    config_file,
    folder,
    overrides,
    leave_at=0,
    error=None,
    score=False,
    epochs=None,
    device="cpu",
    prepare=None,
):
    """Train on this rank, if asked to with a leave and a resume; everything that came of it."""
    seen = []
    for name, value in QUICK_COMPILER.items():
        setattr(torch._inductor.config, name, value)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    engine.build_model = lambda *arguments, **options: Small(lambda *what: seen.append(what)).to(
        memory_format=torch.channels_last
    )
    engine.torch_threads = lambda ranks_per_cpu: 1
    if prepare is not None:
        prepare(seen)
    config = load_config(config_file, [f"run.dir={folder}", "train.deterministic=true", *overrides])
    world = distributed.current_world(device)
    run = RunDir(folder)
    run.path.mkdir(exist_ok=True)
    train_file, val_file, _ = open_files(config)
    checkpoints = Checkpoints(run.checkpoints, world, asynchronous=False)
    training = Training(
        config,
        world,
        run,
        train_file,
        val_file,
        epochs or config.train.epochs,
        config.train.global_batch_size,
        checkpoints=checkpoints,
    )
    if score:
        training = observed(training, ShardedScorer(120, 10, config.windows(), device=device))
    outcome, threads = "done", []
    try:
        fit(
            replace(training, observer=Leaves(training.interruption, leave_at, error))
            if leave_at
            else training
        )
    except (Preempted, RuntimeError) as left:
        outcome = type(left).__name__
        # here: once the exception is gone, those of its frames end by themselves
        threads = loading_threads()
        found = checkpoints.latest()
        if error is None:
            again = replace(training, resume=found, interruption=type(training.interruption)())
            assert found.record["steps_of_epoch"] > 0, "left in the middle of an epoch"
            fit(again)
    checkpoints.close()
    threads += loading_threads()
    final = {} if error else torch.load(run.models / "final.pt", weights_only=True)
    keys = ("train_loss", "train_top1", "val_loss", "val_top1")
    return {
        "outcome": outcome,
        "seen": list(seen),
        "weights": {name: value.numpy() for name, value in final.items()},
        "metrics": [{key: found.get(key) for key in keys} for found in run.read_metrics()],
        "threads": threads,
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        "precision": torch.get_float32_matmul_precision(),
    }


def loading_threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(THREAD_NAME)]


def trained(world_size, config_file, folder, *calls, deadline=120.0):
    """What `train` gives on rank 0 for each of (overrides, options), in the same processes: they
    start slowly."""
    return run_ranks(world_size, _train, config_file, folder, calls, deadline=deadline)[0]


def _train(rank, config_file, folder, calls):
    return [
        train(rank, config_file, folder / str(number), overrides, **options)
        for number, (overrides, options) in enumerate(calls)
    ]


def assert_same(a, b):
    assert a["weights"].keys() == b["weights"].keys()
    assert [
        name for name in a["weights"] if not np.array_equal(a["weights"][name], b["weights"][name])
    ] == []
    assert a["threads"] == b["threads"] == []


def assert_resumed(whole, left):
    assert (whole["outcome"], left["outcome"]) == ("done", "Preempted")
    assert_same(whole, left)


def distance(a, b):
    return max(
        np.abs(a["weights"][name].astype(float) - b["weights"][name]).max() for name in a["weights"]
    )


# ---- images that grow


def literal_size(epoch, start, final, first, last):
    """get_resolution of libffcv/ffcv-imagenet's train_imagenet.py."""
    if epoch <= first:
        return start
    if epoch >= last:
        return final
    return int(np.round(np.interp([epoch], [first, last], [start, final])[0] / 32)) * 32


def growing(config_file, start, final, first, last, epochs):
    growth = f"data.progressive={{start_size: {start}, from_epoch: {first}, to_epoch: {last}}}"
    sizes = ["data.crop=resized", f"data.image_size={final}", growth]
    return load_config(config_file, [*sizes, f"train.epochs={epochs}"])


@pytest.mark.parametrize(
    ("start", "final", "first", "last"), [(160, 192, 35, 39), (96, 224, 0, 80), (128, 320, 2, 9)]
)
def test_sizes_are_those_of_the_recipe(config_file, start, final, first, last):
    config = growing(config_file, start, final, first, last, 90)
    sizes = [training_size(config, epoch, 90) for epoch in range(90)]
    assert sizes == [literal_size(epoch, start, final, first, last) for epoch in range(90)]
    assert set(sizes) <= set(training_sizes(config))
    assert (sizes[0], sizes[-1]) == (start, final)


def test_sizes_in_between_stay_between_the_ends(config_file):
    config = growing(config_file, 50, 70, 1, 39, 40)
    sizes = [training_size(config, epoch, 40) for epoch in range(40)]
    # rounding alone would give 96 and 32 as well
    assert sorted(set(sizes)) == [50, 64, 70] == training_sizes(config)
    assert sizes == sorted(sizes)
    assert parse_config(to_dict(config)) == config, "as a run records it"
    config = load_config(config_file)
    assert (training_size(config, 0, 9), training_sizes(config)) == (32, [32]), "without growth"


@pytest.mark.parametrize("epochs", [1, 2, 7, 60, 400])
def test_a_training_of_other_length_goes_through_the_same_sizes(config_file, epochs):
    config = growing(config_file, 96, 224, 10, 50, 60)
    sizes = [training_size(config, epoch, epochs) for epoch in range(epochs)]
    assert sizes[-1] == 224
    assert sizes[0] == (96 if epochs > 1 else 224)
    assert sizes == sorted(sizes)
    assert set(sizes) <= set(training_sizes(config))
    for epoch, size in enumerate(sizes[:-1]):  # at the same share of the way
        assert size == training_size(config, round(epoch / (epochs - 1) * 5900), 5901)


@pytest.mark.distributed
def test_training_and_evaluation_see_their_sizes(config_file, tmp_path):
    """Also where the training is longer than the config's, and begins again in the middle of an
    epoch."""
    settings = [*GROWING, "data.eval_size=40"]
    whole, left, longer = trained(
        1,
        config_file,
        tmp_path,
        *((settings, options) for options in ({}, {"leave_at": 7}, {"epochs": 9})),
    )
    assert sizes_of(whole) == sizes_of(left) == ([[16], [24], [24], [32], [32]], {40})
    assert_resumed(whole, left)
    assert sizes_of(longer)[0] == [[16], [16], [24], [24], [24], [32], [32], [32], [32]]


def sizes_of(outcome):
    """Of training by epoch (5 steps each), and of evaluation; the pass that settles DDP's buckets
    has two rows."""
    steps = [shape for training, shape in outcome["seen"] if training and shape[0] > 2]
    epochs = [
        sorted({shape[-1] for shape in steps[first : first + 5]})
        for first in range(0, len(steps), 5)
    ]
    return epochs, {shape[-1] for training, shape in outcome["seen"] if not training}


def test_preflight_tries_every_size(config_file):
    def check(*overrides):
        config = load_config(
            config_file,
            ["data.crop=resized", "model.name=alexnet", "data.image_size=96", *overrides],
        )
        preflight(config, *open_files(config)[:2], 4, "cpu")

    check()
    check("data.progressive={start_size: 64, from_epoch: 0, to_epoch: 2}", "data.eval_size=128")
    small_first = "data.progressive={start_size: 16, from_epoch: 0, to_epoch: 2}"
    for overrides, said in (
        ([small_first], r"train on 4 images of 16x16 .*use another data\.progressive"),
        (["data.eval_size=16"], r"evaluate 4 images of 16x16 .*use another data\.eval_size"),
        (["data.image_size=24", "data.eval_size=96"], r"train on .* 24x24 .* data\.image_size"),
    ):
        refused(f"cannot {said}", check, *overrides)


@pytest.mark.parametrize(
    ("name", "is_refused"), [("vgg11", True), ("alexnet", True), ("resnet18", False)]
)
def test_preflight_refuses_gradients_that_cuda_cannot_repeat(config_file, name, is_refused):
    def check(deterministic, device_type):
        overrides = f"model.name={name} train.deterministic={deterministic} data.crop=resized data.image_size=64 data.eval_size=64".split()
        config = load_config(config_file, overrides)
        return catch(preflight, config, *open_files(config)[:2], 4, device_type)

    assert check(False, "cuda") == check(True, "cpu") == ("", "")
    kind, text = check(True, "cuda")
    assert (kind == "InputError") == is_refused
    assert ("set train.deterministic=false, or use a network that" in text) == is_refused


# ---- fused optimizers


@pytest.mark.distributed
def test_a_fused_optimizer_takes_the_same_steps_and_resumes_bitwise(config_file, tmp_path):
    calls = []
    for optimizer in ("sgd", "adamw"):
        base = [f"train.optimizer={optimizer}", "train.lr=0.01", "train.decay_norm_and_bias=false"]
        fused = [*base, "train.fused_optimizer=true"]
        calls += [(base, {}), (fused, {}), (fused, {"leave_at": 7})]
    found = trained(1, config_file, tmp_path, *calls)
    for plain, whole, left in (found[:3], found[3:]):
        assert distance(plain, whole) < 1e-3
        assert_resumed(whole, left)


def test_which_optimizer_is_fused(config_file):
    model = nn.Linear(3, 4)

    def fused(*overrides):
        return {
            build_optimizer(
                model, load_config(config_file, (*overrides, f"train.optimizer={kind}"))
            ).defaults["fused"]
            for kind in ("sgd", "adamw")
        }

    assert fused("train.fused_optimizer=true") == {True}
    assert fused("train.fused_optimizer=false") == fused() == {None}  # on the CPU


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_fused_optimizer_forgets_a_first_step_that_overflows(config_file, optimizer, nesterov):
    """As torch's loss scaling leaves out a step: the bits after it are those without it."""
    config = load_config(
        config_file,
        f"train.optimizer={optimizer} train.nesterov={nesterov} train.fused_optimizer=true train.lr=0.1".split(),
    )

    def after(overflows, build):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        model.to(memory_format=torch.channels_last)
        optimizer = build(model)
        for overflow in overflows:
            optimizer.found_inf = torch.tensor(float(overflow))
            optimizer.grad_scale = torch.tensor(1.0)
            for parameter in model.parameters():
                values = torch.randn(parameter.shape) if not overflow else torch.inf
                parameter.grad = torch.empty_like(parameter).detach().copy_(torch.as_tensor(values))
            optimizer.step()
        return [*model.parameters(), *(v for s in optimizer.state.values() for v in s.values())]

    def stock(model):
        options = {"momentum": config.train.momentum, "nesterov": nesterov}
        kind = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
        return kind(
            model.parameters(),
            lr=0.1,
            weight_decay=config.train.weight_decay,
            fused=True,
            **(options if optimizer == "sgd" else {"betas": config.train.betas}),
        )

    expected = after([False, False], stock)
    for overflows in ([False, False], [True, False, False]):
        found = after(overflows, lambda model: build_optimizer(model, config))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# ---- how gradients travel


@pytest.mark.distributed
def test_gradients_of_16_bits_and_a_static_graph(config_file, tmp_path):
    """The first trains close by, with bits of its own that a resumed run repeats; the second
    changes none, and neither does a batch in two passes hurt."""
    two = ["train.accumulation=2", "train.matmul_precision=high"]
    compress = [*two, "train.compress_gradients=true"]
    plain, static, compressed, left = trained(
        3,
        config_file,
        tmp_path,
        (two, {}),
        ([*two, "train.static_graph=true"], {}),
        (compress, {}),
        (compress, {"leave_at": 13}),
    )
    assert {outcome["precision"] for outcome in (plain, static, compressed)} == {"high"}
    assert_same(plain, static)
    assert 1e-5 < distance(plain, compressed) < 0.1
    assert_resumed(compressed, left)


@pytest.mark.parametrize("more", [[], ["model.compile=true"]])
def test_batch_norm_over_all_ranks_is_refused_where_it_does_not_work(config_file, more):
    config = load_config(config_file, ["train.sync_batch_norm=true", *more])
    for device_type, is_refused in (("cpu", True), ("cuda", bool(more))):
        kind, text = catch(preflight, config, *open_files(config)[:2], 4, device_type)
        assert (kind == "InputError") == is_refused
        assert ("works on CUDA only, and without model.compile" in text) == is_refused


# ---- compiled networks


@pytest.mark.slow
@pytest.mark.parametrize("channels_last", [True, False])
@torch._inductor.config.patch(QUICK_COMPILER)
def test_a_compiled_input_stage_gives_the_same_bits(channels_last):
    eager, compiled = (
        InputStage((1.5, 2.25, 123.7), (70.1, 3.3, 9.0), channels_last) for _ in range(2)
    )
    compiled.compile(dynamic=False)
    image = torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    expected, found = eager(image), compiled(image)
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()


@pytest.mark.slow
@pytest.mark.distributed
def test_a_compiled_network_trains_as_it_would_have(config_file, tmp_path):
    """With recording, from an extra clean view too, which is eager; names in checkpoints and models
    stay."""
    clean = ["score.view=clean", "train.mixup=0.2"]
    compile = [*clean, "model.compile=true"]
    plain, compiled, scored = trained(
        1,
        config_file,
        tmp_path,
        (clean, {}),
        (compile, {}),
        (compile, {"score": True}),
        deadline=400.0,
    )
    # the network, and its input
    assert (plain["graphs"], compiled["graphs"], scored["graphs"]) == (0, 2, 2)
    assert not any(training for training, _ in compiled["seen"]), "evaluation alone is eager"
    assert (
        plain["weights"].keys()
        == compiled["weights"].keys()
        == dict(Small(None).state_dict()).keys()
    )
    assert 0 < distance(plain, compiled) < 1e-3
    assert_same(compiled, scored)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_compiled_network_on_ranks_resumes_bitwise(config_file, tmp_path):
    """Two forward passes per step, of which DDP lets one be; a graph for each of two sizes: one
    before the run leaves, and one after."""
    plain = [
        "data.crop=resized",
        "data.progressive={start_size: 24, from_epoch: 0, to_epoch: 1, multiple: 8}",
        "train.epochs=2",
        "score.windows=[{T: 2, K: 2}]",
        "train.accumulation=2",
    ]
    compile = [*plain, "model.compile=true"]
    eager, whole, left = trained(
        2,
        config_file,
        tmp_path,
        (plain, {}),
        (compile, {}),
        (compile, {"leave_at": 3}),
        deadline=400.0,
    )
    assert whole["graphs"] >= 4
    assert_resumed(whole, left)
    assert 0 < distance(eager, whole) < 1e-3


@pytest.mark.slow
@pytest.mark.distributed
def test_compile_failure_is_said(config_file, tmp_path):
    """One line instead of the compiler's pages."""
    kind, text = run_ranks(1, _no_compiler, config_file, tmp_path / "run")[0]
    assert kind == "InputError"
    assert "model.compile=true: torch.compile fails on model.name=tiny_network" in text
    assert "set model.compile=false" in text
    assert "\n" not in text


def _no_compiler(rank, config_file, folder):
    from torch._inductor import cpp_builder

    def fail(*arguments, **options):
        raise torch._inductor.exc.InvalidCxxCompiler

    cpp_builder.get_cpp_compiler = fail
    torch._inductor.config.force_disable_caches = True
    return catch(train, rank, config_file, folder, ["model.compile=true"])


# ---- decoding ahead


@pytest.mark.distributed
def test_what_follows_is_started_before_it_is_needed(config_file, tmp_path):
    """120 images in 5 steps: what follows starts with 3 to go. The results are those of a loop that
    does not look ahead."""
    overrides = ["train.eval_every=2", "train.epochs=4"]
    ahead, behind = trained(
        2,
        config_file,
        tmp_path,
        (overrides, {"prepare": _note_openings}),
        (overrides, {"prepare": _do_not_look_ahead}),
    )
    events = [
        what if isinstance(what[0], str) else "t" if what[0] else "v" for what in ahead["seen"]
    ]
    opened = {what: events.index(what) for what in events if not isinstance(what, str)}
    of_training, of_val = [("train", epoch) for epoch in range(4)], [("val", 1), ("val", 3)]
    assert list(opened) == [*of_training[:2], of_val[0], *of_training[2:], of_val[1]]
    num_val = -(-50 // 24)
    # but for that of the start
    steps = [sum(event == "t" for event in events[:place]) - 1 for place in opened.values()]
    assert steps == [0, 2, 7, 10, 12, 17]
    evaluated = [sum(event == "v" for event in events[:place]) for place in opened.values()]
    assert evaluated == [0, 0, 0, num_val - num_val, num_val, num_val]
    assert_same(ahead, behind)
    assert json.dumps(ahead["metrics"]) == json.dumps(behind["metrics"])


def _note_openings(seen):
    batches = BetonLoader.batches

    def note(loader, order, **where):
        seen.append(("val" if loader.view.crop == "center" else "train", where["epoch"]))
        return batches(loader, order, **where)

    BetonLoader.batches = note


def _do_not_look_ahead(seen):
    Trainer._look_ahead = lambda trainer, num_left: None


@pytest.mark.distributed
def test_every_way_out_ends_the_loading_threads(config_file, tmp_path):
    """From the middle of an epoch; with the next pass started already; after it."""
    calls = [
        ([f"train.eval_every={every}"], {"leave_at": leave_at, "error": RuntimeError("boom")})
        for every in (1, 3)
        for leave_at in (3, 5, 6)
    ]  # evaluation is next, or the next epoch
    for failed in trained(1, config_file, tmp_path, *calls):
        assert (failed["outcome"], failed["threads"]) == ("RuntimeError", [])


# ---- what is on anyway


@pytest.mark.distributed
def test_gradients_live_in_the_buckets(tmp_path):
    """One bucket holds them all: no second copy, and none to make."""
    assert run_ranks(1, _storages_of_gradients)[0] == (1, 5)


def _storages_of_gradients(rank):
    model = Small(lambda *what: None)
    replicas = collectives.data_parallel(model, distributed.current_world("cpu"))
    for _ in range(2):  # the first sorts the buckets
        replicas.zero_grad(set_to_none=True)
        replicas(torch.randn(2, 3, 8, 8)).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    return len({gradient.untyped_storage().data_ptr() for gradient in gradients}), len(gradients)


@pytest.mark.distributed
def test_the_pass_that_settles_buckets_has_no_other_effect():
    assert run_ranks(1, _what_settling_keeps)[0] == [True, True, True]


def _what_settling_keeps(rank):
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))
    replicas = collectives.data_parallel(model, distributed.current_world("cpu"))
    random, before = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    state.settle_buckets(replicas, torch.randn(3, 4, generator=torch.Generator()), nullcontext())
    after = model.state_dict().items()
    return [
        torch.equal(torch.get_rng_state(), random),
        all(torch.equal(value, before[name]) for name, value in after),
        all(parameter.grad is None for parameter in model.parameters()),
    ]


def test_cudnn_looks_for_the_fastest_unless_bits_matter():
    before = torch.backends.cudnn.benchmark
    try:
        for wanted in (True, False, True):
            set_deterministic(wanted)
            assert torch.backends.cudnn.benchmark is not wanted
            assert torch.are_deterministic_algorithms_enabled() is wanted
    finally:
        set_deterministic(False)
        torch.backends.cudnn.benchmark = before


# ---- on a GPU


@on_cuda
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_on_cuda_fused_steps_resume_bitwise(config_file, tmp_path, optimizer, amp):
    """With loss scaling, clipping and images that grow; deterministic, so that bits can be
    compared."""
    overrides = [
        *GROWING,
        *f"train.optimizer={optimizer} train.amp={amp} train.lr=0.01 run.device=cuda".split(),
    ]
    calls = [
        (overrides + more, {"leave_at": leave_at, "device": "cuda"})
        for more in ([], ["train.clip_norm=1.0"])
        for leave_at in (0, 7)
    ]
    found = trained(1, config_file, tmp_path, *calls)
    assert_resumed(*found[:2])
    assert_resumed(*found[2:])


@on_cuda
def test_on_cuda_a_compiled_network_trains_as_it_would_have(config_file, tmp_path):
    base = [*GROWING, "run.device=cuda"]
    plain, compiled = trained(
        1,
        config_file,
        tmp_path,
        *(([*base, *more], {"device": "cuda"}) for more in ([], ["model.compile=true"])),
    )
    assert compiled["graphs"] == 6
    assert distance(plain, compiled) < 1e-2


@on_cuda
def test_no_step_of_the_loop_waits_for_the_device(config_file, tmp_path):
    """Training steps and evaluation under torch's watch; what is read at log cadence and at ends of
    epochs is let be."""
    overrides = ["run.device=cuda", "train.log_every=1000"]
    outcome = trained(
        1,
        config_file,
        tmp_path,
        (overrides, {"device": "cuda", "score": True, "prepare": _forbid_waits}),
    )[0]
    assert outcome["outcome"] == "done"
    assert len(outcome["metrics"]) == 3


def _forbid_waits(seen):
    """In every forward and backward pass, update and look at a batch of evaluation."""
    from tdds_dist.training import metrics

    def watch(owner, name):
        real = getattr(owner, name)

        def watched(*arguments, **options):
            torch.cuda.set_sync_debug_mode("error")
            try:
                return real(*arguments, **options)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        setattr(owner, name, watched)

    for owner, name in (
        (Trainer, "_forward_backward"),
        (Trainer, "_update"),
        (metrics.Accuracy, "add"),
    ):
        watch(owner, name)
