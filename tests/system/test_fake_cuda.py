"""A step on CUDA without a GPU: engine, scorer, loader, final pass and checkpoint as they are, on
torch's fake tensors.

Under `FakeTensorMode` a tensor on "cuda" has shape, dtype and device and no memory: every line of a
step runs, and nothing is computed. That shows a CPU tensor that meets a CUDA tensor, a number that
the host reads from the device, a copy or an event for which it waits, and how many operations a
step hands to the device. It shows no times, no wrong numbers, no races, and not whether host memory
is page-locked: that takes a GPU (test_cuda.py).

All runs in one process of its own, as rank 0 of two in torch's `fake` process group, whose
collectives do nothing. `without_driver` lists what has a stand-in there. Most of it asks the
driver: streams, events, threads on a device, random states, whether autocast is possible, the
launch of the Triton kernel (its arguments are checked against its signature, and it counts as one
operation), DDP (its reducer times itself by CUDA events; `Replica` has the same bucket) and
backward (torch's engine looks for contexts; `backward` walks the same graph). The others are what
fake tensors cannot do: be moved in place by `Module.to`, give their memory to NumPy, be validated.
"""

# B rows of a rank and step, C classes, E elements of all parameters, N images, P parameters, S
# steps

import collections
import contextlib
import inspect
import os
import queue
import traceback
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from tdds_dist import ShardedScorer
from tdds_dist.config.run import parse_config
from tdds_dist.data import loader as loading
from tdds_dist.data.beton import BetonInfo, inspect_beton
from tdds_dist.distributed import collectives, host_memory
from tdds_dist.distributed.partition import epoch_order
from tdds_dist.distributed.world import current_world
from tdds_dist.runs.checkpoint import Checkpoints
from tdds_dist.runs.directory import RunDir
from tdds_dist.training import final_pass, state
from tdds_dist.training.collect import observed
from tdds_dist.training.engine import Trainer
from tdds_dist.training.training import Training
from tests import make
from tests.ranks import catch, run_ranks

pytest.importorskip("triton")

CUDA = torch.device("cuda", 0)
N, C, BATCH = 240, 1000, 96  # images, classes, rows of a step over both ranks: the last has padding
NUMPY = {torch.float32: np.float32, torch.int64: np.int64, torch.uint8: np.uint8}

# What is trained: overrides of the config. ResNet-18 for 32 pixels, scores in the kernel unless the
# name says otherwise.
SETTINGS = {
    "float32": {},
    "bf16": {"train": {"amp": "bf16"}},
    "fp16": {"train": {"amp": "fp16"}},
    "adamw, clipped, not channels_last": {
        "train": {"optimizer": "adamw", "clip_norm": 1.0},
        "model": {"channels_last": False},
    },
    "accumulation 2": {"train": {"accumulation": 2}},
    "mixup, clean view": {"train": {"mixup": 0.2}, "score": {"view": "clean"}},
    "quarantine, bf16": {"score": {"on_nan": "quarantine"}, "train": {"amp": "bf16"}},
    "no kernel": {},
    "topk": {"score": {"storage": "topk:10"}},
    "retrain by importance": {},
}
# Operations by setting and step: an optimizer step in the middle of an epoch, and the last one.
# Views and memory that is not filled count nothing. With torch 2.11; a change that means to add or
# remove operations puts the new numbers here, and its message says why.
OPERATIONS = {
    "float32": {"step": 244, "last step": 255},
    "bf16": {"step": 291, "last step": 302, "evaluation": 114},
    "fp16": {"step": 302, "last step": 313},
    "adamw, clipped, not channels_last": {"step": 254, "last step": 265},
    "accumulation 2": {"step": 486, "last step": 556},
    "mixup, clean view": {"step": 326, "last step": 337},
    "quarantine, bf16": {"step": 325, "last step": 332},
    "no kernel": {"step": 320, "last step": 331},
    "topk": {"step": 346, "last step": 357},
    "retrain by importance": {"step": 242, "last step": 247},
    "final pass": {"step": 129},
}


class Watch(TorchDispatchMode):
    """Count the operations that touch the device; raise where the host would wait for it in a step.

    `answer`: what the host reads of the device, or None within a step, where it must not. `waits`:
    how often it waited outside of steps. `step`: of the epoch under way. `log`: of streams.
    """

    def __init__(self):
        super().__init__()
        self.operations, self.log = collections.Counter(), []
        self.answer, self.waits, self.step = 0, 0, None

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        options, name = options or {}, str(operation)
        inputs = [leaf for leaf in tree_leaves((arguments, options)) if torch.is_tensor(leaf)]
        devices = {tensor.device.type for tensor in inputs}
        if operation is torch.ops.aten._local_scalar_dense.default:
            if "cuda" not in devices:
                return 0  # a choice of the host's own, as of mixup
            self.wait("reads a number")
            return self.answer
        if operation is torch.ops.aten._fused_sgd_.default:  # torch has no fake form of it
            assert {tensor.device for tensor in inputs} == {CUDA}
            outputs = None
        else:
            outputs = operation(*arguments, **options)
        devices |= {leaf.device.type for leaf in tree_leaves(outputs) if torch.is_tensor(leaf)}
        is_copy = operation.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
        is_asynchronous = options.get("non_blocking") or any(each is True for each in arguments)
        if is_copy and len(devices) == 2 and not is_asynchronous:
            self.wait("copies to or from it without non_blocking")
        is_view = operation.is_view or torch.Tag.inplace_view in operation.tags
        is_free = is_view or name.startswith(("prim.", "aten.empty", "aten.new_empty"))
        self.operations[name] += "cuda" in devices and not is_free
        return outputs

    def wait(self, what="synchronizes"):
        """Note a wait; raise in a step."""
        if self.answer is None:
            raise AssertionError(f"the host waits for the device in a step: it {what}")
        self.waits += 1


# ---- in place of the driver, and of what fake tensors cannot do


class Replica(nn.Module):
    """What the engine uses of DDP: gradients that lie side by side in a bucket, one all-reduce."""

    def __init__(self, module, *, static_graph=False, **options):
        super().__init__()
        self.static_graph = static_graph
        self.module, self.parameters_P = module, [*module.parameters()]
        sizes = [parameter.numel() for parameter in self.parameters_P]
        self.bucket_E, self.is_synchronized = torch.zeros(sum(sizes), device=CUDA), True
        parts = zip(self.bucket_E.split(sizes), self.parameters_P, strict=True)
        self.views_P = [part.view_as(parameter) for part, parameter in parts]
        Replica.latest = self

    def forward(self, image):
        return self.module(image)

    @contextlib.contextmanager
    def no_sync(self):
        self.is_synchronized = False
        yield
        self.is_synchronized = True

    def reduce(self):
        if self.is_synchronized:
            for parameter, view in zip(self.parameters_P, self.views_P, strict=True):
                torch.mul(parameter.grad, 0.5, out=view)
                parameter.grad = view
            dist.all_reduce(self.bucket_E)


def backward(loss):
    """Do as `Tensor.backward`, one node of the graph after the other."""
    start = loss.grad_fn
    waits_for, found = collections.Counter(), [start]
    for node in found:
        for following, _ in node.next_functions:
            if following is not None:
                if following not in waits_for:
                    found.append(following)
                waits_for[following] += 1
    gradients, ready = {start: [torch.ones_like(loss)]}, [start]
    with torch.no_grad():
        while ready:
            node = ready.pop()
            inputs = gradients.pop(node)
            if hasattr(node, "variable"):
                _accumulate(node.variable, inputs[0])
                continue
            outputs = node(*inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            for (following, number), gradient in zip(node.next_functions, outputs, strict=True):
                if following is None:
                    continue
                slots = gradients.setdefault(following, [None] * len(following._input_metadata))
                if gradient is not None:
                    like = following._input_metadata[number]
                    gradient = gradient.sum_to_size(like.shape).to(like.dtype)
                    slots[number] = gradient if slots[number] is None else slots[number] + gradient
                waits_for[following] -= 1
                if not waits_for[following]:
                    ready.append(following)
        Replica.latest.reduce()


def _accumulate(parameter, gradient):
    assert gradient.device == parameter.device
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad += gradient


def move(module, function, recurse=True):
    """Do as `Module._apply`, with new parameters instead of changed ones."""
    for child in module.children():
        move(child, function)
    for name, value in module._parameters.items():
        if value is not None:
            moved = function(value.detach())
            module._parameters[name] = nn.Parameter(moved, value.requires_grad)
    for name, value in module._buffers.items():
        if value is not None:
            module._buffers[name] = function(value)
    return module


class Stream:
    """A stream of the device, or an event of one: notes when it is recorded and waited for."""

    def __init__(self, watch):
        self._watch, self.device = watch, CUDA

    def record_event(self):
        return Event(self._watch)

    def wait_event(self, event):
        self._watch.log.append(("stream waits", event))


class Event:
    def __init__(self, watch):
        self._watch, self._step = watch, watch.step
        watch.log.append(("recorded", self))

    def synchronize(self):
        if self._step is not None and self._step == self._watch.step:
            self._watch.wait("waits for an event of this very step")
        self._watch.log.append(("host waits", self))


class Inline:
    """A thread that does its work when it starts: fake tensors belong to one thread."""

    def __init__(self, work, device, name):
        assert device == CUDA
        self.start = work

    def is_alive(self):
        return False

    def join(self, timeout=None):
        pass


class Kernel:
    """The launch of the Triton kernel: counted; its arguments must fit it and lie on the device."""

    def __init__(self, kernel, watch):
        self._parameters, self._watch, self.works = inspect.signature(kernel.fn), watch, True

    def __getitem__(self, grid):
        return self._launch

    def _launch(self, *arguments, num_warps, **constants):
        if not self.works:
            raise RuntimeError("no C compiler")
        self._parameters.bind(*arguments, **constants)
        assert {leaf.device for leaf in arguments if torch.is_tensor(leaf)} == {CUDA}
        self._watch.operations["_update_row"] += 1


def with_real_tensors(function):
    """Return the function, which reads tensors of its own on the CPU, outside of all modes."""

    def call(*arguments, **options):
        with _disable_current_modes():
            return function(*arguments, **options)

    return call


def without_driver(watch):
    """Put all stand-ins in place, for the rest of this process."""
    from tdds_dist.scoring import shard_triton

    torch.version.cuda = torch.version.cuda or "13.0"
    torch.backends.cudnn.enabled = False  # batch norm is one operation with cuDNN, and without
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda: True
    torch.cuda.get_rng_state = lambda device="cuda": torch.zeros(16, dtype=torch.uint8)
    torch.cuda.set_rng_state = lambda state, device="cuda": None
    torch.utils._foreach_utils._foreach_supported_types.append(FakeTensor)
    torch.distributions.Distribution.set_default_validate_args(False)  # it looks at values
    torch.cuda.device_of = lambda tensor: nullcontext()
    torch.cuda.synchronize = watch.wait
    nn.Module._apply = move
    torch.Tensor.backward = backward
    torch.cuda.Stream = torch.cuda.current_stream = lambda device=None: Stream(watch)
    torch.cuda.stream = lambda stream: nullcontext()
    torch.Tensor.record_stream = lambda tensor, stream: watch.log.append(
        ("kept for a stream", id(tensor))
    )
    torch.Tensor.numpy = lambda tensor: np.zeros(tensor.shape, NUMPY[tensor.dtype])
    host_memory.DeviceThread, host_memory._lock = Inline, lambda block, device: None
    DeviceMesh.from_group = staticmethod(with_real_tensors(DeviceMesh.from_group))
    collectives.gather_objects = lambda value, world, group=None: [value]
    nn.parallel.DistributedDataParallel = Replica
    collectives.control_group = lambda *_: None
    shard_triton._update_row = Kernel(shard_triton._update_row, watch)


# ---- a training


class Feed:
    """Give empty batches on the device; note the operations between one and the next."""

    def __init__(self, training, watch):
        self._training, self._watch, self.operations_S = training, watch, []

    def start(self, which):
        pass

    def take(self, which, first_step=0):
        training, (kind, epoch) = self._training, which
        num_samples, subset_M = (
            (training.num_samples, training.subset_M) if kind == "train" else (N, None)
        )
        order = epoch_order(num_samples, 2 * training.rows, epoch=epoch, subset=subset_M)
        self.operations_S = []
        return order, self._batches(order.num_steps)

    def _batches(self, num_steps):
        rows, watch = self._training.rows, self._watch
        image = torch.zeros(rows, 32, 32, 3, dtype=torch.uint8, device=CUDA).permute(0, 3, 1, 2)
        for watch.step in range(num_steps):
            label_B, index_B = torch.zeros(2, rows, dtype=torch.int64, device=CUDA)
            watch.operations.clear()
            watch.answer = None
            yield loading.Batch(image, label_B, index_B)
            self.operations_S.append(+watch.operations)
        watch.answer, watch.step = 1, None


def training_of(folder, changes, **options):
    changes = {
        "data": {"num_classes": C},
        "model": {"cifar_stem": True} | changes.get("model", {}),
        "train": {"global_batch_size": BATCH} | changes.get("train", {}),
        "score": {"windows": [{"T": 3, "K": 2}]} | changes.get("score", {}),
    }
    zeros_N = np.zeros(N, np.int64)
    file = BetonInfo(Path("not read"), N, 0, [], "", "", zeros_N, *[zeros_N] * 5)
    config, world = parse_config(make.config(**changes)), current_world(CUDA)
    return Training(config, world, RunDir(folder), file, file, 3, BATCH, **options)


def scorer_of(training):
    score = training.config.score
    options = {"device": CUDA, "storage": score.storage, "on_nan": score.on_nan}
    return ShardedScorer(N, C, training.config.windows(), **options)


def train(watch, folder, name):
    """Train by a setting; return the operations of both steps, and of a batch of evaluation."""
    from tdds_dist.scoring import shard_triton

    has_kernel = name not in ("no kernel", "topk")
    shard_triton._update_row.works = name != "no kernel"
    if name.startswith("retrain"):
        options = {"importance": "sample", "importance_N": np.ones(N, np.float32)}
        training = training_of(folder, {}, subset_M=np.arange(200), **options)
    else:
        training = training_of(folder, SETTINGS[name])
        training = observed(training, scorer_of(training))
        assert training.observer._is_fused == has_kernel
    feed = Feed(training, watch)
    trainer = Trainer(training, feed)
    for trainer.epoch in range(1 if has_kernel else 2):  # the plain update does more in the second
        trainer.micro = 0
        trainer.train_epoch()
        operations_S = feed.operations_S
        watch.answer = 0
        trainer._observe(lambda observer: observer.end_epoch())
    per_step = training.config.train.accumulation
    found = {"step": operations_S[per_step : 2 * per_step], "last step": operations_S[-per_step:]}
    if name == "bf16":
        trainer.evaluate(0)
        found["evaluation"] = feed.operations_S[:1]
    return {which: sum(parts, collections.Counter()) for which, parts in found.items()}


# ---- what is around a step


def score_weights(watch, folder):
    """Make the final pass; return the operations of its second step."""
    training = training_of(folder, {"train": {"amp": "bf16"}})
    feed = Feed(training, watch)
    weights = final_pass.build_model("resnet18", C, cifar_stem=True).state_dict()
    batches = SimpleNamespace(batches=lambda order, **_: feed.take(("val", 0))[1])
    final_pass._read_weights = lambda run: weights
    final_pass.BetonLoader = lambda *arguments, **options: batches
    values, _ = final_pass.run_model(
        training.config, training.world, training.train_file, training.run
    )
    assert {name: len(value) for name, value in values.items()} == {"entropy": N, "moderate": N}
    return {"step": feed.operations_S[1]}


def stage(watch, folder):
    """Copy the state of a training with scores to host memory, twice; return the waits of each."""
    training = training_of(folder, {})
    scorer = scorer_of(training)
    trainer = Trainer(observed(training, scorer), Feed(training, watch))
    trainer.train_epoch()
    watch.answer = 0
    scorer.end_epoch()
    observer, checkpoints = scorer.state_dict(), Checkpoints(folder, training.world)
    wanted = state.tensors_of(
        trainer.model, trainer.optimizer, observer, trainer.totals_3, training.world
    )
    assert {"optimizer/conv1.weight/momentum_buffer", "observer/logp"} <= {*wanted}
    waits = [watch.waits]
    for _ in range(2):
        staged = checkpoints._staged(wanted)
        waits.append(watch.waits)
        assert [*staged] == [*wanted]
        for like, tensor in zip(wanted.values(), staged.values(), strict=True):
            assert (tensor.shape, tensor.dtype) == (like.shape, like.dtype)
            assert collectives.own_rows(tensor).device.type == "cpu"
    return np.diff(waits).tolist()


def load(watch, path):
    """Read a file of 97 images in nine steps, twice, through five slots; check who waits for which
    copy, and return the operations of each pass."""
    endless = SimpleNamespace(Queue=lambda size: queue.Queue())  # all is read before the first take
    loading.queue = SimpleNamespace(**vars(queue) | vars(endless))
    loader = loading.BetonLoader(inspect_beton(path), 6, loading.View(32), device=CUDA)
    order, num_slots, found = epoch_order(97, 12), loader.batches_ahead + 2, []
    watch.answer = None
    for epoch in range(2):
        watch.log.clear()
        watch.operations.clear()
        batches = loader.batches(order, rank=0, world_size=2, epoch=epoch)
        found.append(dict(+watch.operations))
        place = {entry: number for number, entry in enumerate(watch.log)}
        copied = [event for what, event in watch.log if what == "recorded"]
        assert len(copied) == order.num_steps > num_slots
        for before, event in zip(copied, copied[num_slots:], strict=False):
            assert place["host waits", before] < place["recorded", event], "a slot is overwritten"
        assert all(("host waits", event) in place for event in copied), "buffers go before a copy"
        for event in copied:
            watch.log.clear()
            batch = next(batches)
            parts = [batch.image, batch.label, batch.index]
            assert {part.device for part in parts} == {CUDA}
            kept = [("kept for a stream", id(part)) for part in parts]
            assert watch.log == [("stream waits", event), *kept]
        assert next(batches, None) is None
    return found


def plant(watch, folder):
    """Return what each fault that this file looks for raises."""
    here, there = torch.zeros(2), torch.zeros(2, device=CUDA)
    faults = {
        "mixed": lambda: here + there,
        "item": lambda: there.sum().item(),
        "list": there.tolist,
        "if": lambda: bool(there.sum() > 0),
        "mask": lambda: there[there > 0],
        "nonzero": there.nonzero,
        "to host": there.cpu,
        "to device": lambda: here.to(CUDA),
        "constant": lambda: torch.tensor([1.0, 2.0], device=CUDA),
        "copy": lambda: here.copy_(there),
        "synchronize": torch.cuda.synchronize,
    }
    watch.answer = None
    return {name: catch(fault)[0] for name, fault in faults.items()}


# ---- in a process of its own


def everything(rank, folder, path):
    """Run all parts; return what each gave, or its traceback."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same where there is a GPU
    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    watch, found = Watch(), {}
    without_driver(watch)
    calls = {name: partial(train, watch, folder, name) for name in SETTINGS} | {
        "final pass": partial(score_weights, watch, folder),
        "checkpoint": partial(stage, watch, folder),
        "loader": partial(load, watch, path),
        "faults": partial(plant, watch, folder),
    }
    for name, call in calls.items():
        watch.answer = 0
        with FakeTensorMode(allow_non_fake_inputs=True), watch:
            try:
                found[name] = call()
            except Exception:
                found[name] = traceback.format_exc()
    return found


@pytest.fixture(scope="module")
def found(betons, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fake")
    return run_ranks(1, everything, folder, betons["raw"], deadline=250)[0]


@pytest.mark.parametrize("name", [*SETTINGS, "final pass", "checkpoint", "loader"])
def test_a_step_stays_on_the_device_and_reads_nothing(found, name):
    assert not isinstance(found[name], str), found[name]


@pytest.mark.skipif(torch.__version__ < "2.11" or torch.__version__ >= "2.12", reason="other torch")
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_step_has_as_many_operations_as_noted(found, name):
    operations = found[name]
    numbers = {which: sum(counts.values()) for which, counts in operations.items()}
    assert numbers == OPERATIONS[name], (
        f"if that is meant, note the new numbers in OPERATIONS; there are now {operations}"
    )


def test_a_batch_is_three_copies_and_a_checkpoint_waits_once(found):
    assert found["loader"] == [{"aten._to_copy.default": 3 * 9}] * 2
    assert found["checkpoint"] == [1, 1]


def test_what_is_looked_for_would_be_found(found):
    assert all(found["faults"].values()), found["faults"]
