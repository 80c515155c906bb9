"""The bytes that a run takes, on the device, in host memory and on disk, from its config alone:
nothing is trained for it.

The scorer's tables and the files are arithmetic on N, C and the ranks. The network is run on
shapes: once on torch's meta device, forward and backward, following which storages are alive; and
for CUDA once forward on fake CUDA tensors, because what autocast and dropout keep for backward
depends on the device. No device and no memory is needed for either, so the batch is the real one
and nothing is extrapolated. `tests/experiments/test_forecast.py` compares each number with what a
run really takes.
"""

# B rows per rank and forward pass, C classes, F scalars, M rows of this rank's shard, N dataset, W
# world size

import math
import warnings
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tdds_dist.config.run import Config, Train
from tdds_dist.config.scores import DENSE, differences_per_window, parse_storage
from tdds_dist.distributed.partition import shard_bounds
from tdds_dist.errors import InputError
from tdds_dist.scoring.sample_stats import SCALARS
from tdds_dist.scoring.scorer import WAITING_NUMBERS
from tdds_dist.scoring.shard import class_dtype, num_blocks
from tdds_dist.training.build import build_on_meta, classifier_layer

_BYTES_OF = {"float32": 4, "float16": 2}
_HEADER_BYTES = 16  # global index and label of a routed row
# of 4 bytes per logit, alive at once while rows are recorded (K << C); measured
_RECORD_TABLES = {"dense": 4, "topk": 7}
_RECORD_ROW_BYTES = 128  # more than that per row: indices, owners, flags; measured
_RANDOM_STATE_BYTES = 5056  # of torch's generator on the CPU
# what torch's file format and .metadata add per tensor of a checkpoint; measured
_TENSOR_FILE_BYTES = 1870
_MODEL_FILE_BYTES = 320  # the same per tensor of a plain state dict; measured


# ---- the scorer


def scorer_bytes(
    config: Config, num_samples: int, world_size: int, rank: int = 0
) -> dict[str, int]:
    """Return the bytes of the tables that `ShardedScorer` allocates on a rank; rank 0 has the
    longest shard."""
    first, end = shard_bounds(num_samples, world_size, rank)
    rows, spare = end - first, 1  # the spare row takes what padding rows write
    per_row = _row_bytes(config)
    return {
        "previous log-probabilities": (
            (rows + spare) * (per_row["logp"] + per_row.get("classes", 0))
        ),
        "ring of loss differences": rows * per_row["delta"],
        "averages over windows": rows * per_row["average"],
        "scalars of this epoch": (rows + spare) * per_row["scalars"],
        "labels, visits and marks": (
            (rows + spare) * per_row["marks"]
            + rows * (per_row["quarantined"] + per_row.get("own visits", 0))
            + 3 * 8
        ),
    }


def _row_bytes(config: Config) -> dict[str, int]:
    """Return the bytes per sample of each of the scorer's tables."""
    windows = dict.fromkeys(config.windows())
    num_classes, logp_bytes = config.data.num_classes, _BYTES_OF[config.score.logp_dtype]
    num_kept = parse_storage(config.score.storage, num_classes)
    return {
        **(
            {"logp": num_classes * logp_bytes}
            if num_kept is None
            else {
                "logp": (num_kept + 2) * logp_bytes,
                "classes": (num_kept + 1) * class_dtype(num_classes).itemsize,
            }
        ),
        "delta": 4 * max(differences_per_window(window, config.score.preset) for window in windows),
        "average": 4 * len(windows),
        "scalars": 4 * len(SCALARS),
        "marks": 8 + 4 + 4,  # label, visits, not finite
        "quarantined": 4,
        **({} if config.prune.method == "none" else {"own visits": 4}),
    }


def payload_bytes(rows: int, num_classes: int, logit_bytes: int) -> int:
    """Return the bytes of `rows` rows on their way to their owners: index, label, logits."""
    return rows * (_HEADER_BYTES + num_classes * logit_bytes)


def recording_bytes(
    rows: int, num_classes: int, logit_bytes: int, storage: str = DENSE, route_every: int = 1
) -> int:
    """Return the bytes of the routing buffers (what is sent, and about as much received) and of the
    work on received rows.

    The rows of `route_every` steps travel together, and those of the next ones are held meanwhile.
    Small steps wait for each other: their rows are held, and put together to be recorded block by
    block.
    """
    next_rows = rows * route_every if route_every > 1 else 0
    rows *= route_every
    waits = rows * num_classes < WAITING_NUMBERS
    held = rows + waits * (WAITING_NUMBERS // num_classes)
    at_once = math.ceil(held / num_blocks(held, num_classes))
    tables = _RECORD_TABLES["dense" if storage == DENSE else "topk"]
    return (
        payload_bytes(rows + next_rows, num_classes, logit_bytes)
        + (1 + waits) * payload_bytes(held, num_classes, logit_bytes)
        + at_once * (tables * num_classes * 4 + _RECORD_ROW_BYTES)
    )


# ---- the network


@dataclass(frozen=True)
class Network:
    """A network at `rows` images per rank. All in bytes, except the counts."""

    parameters: int
    buffers: int
    num_parameters: int  # tensors
    num_buffers: int  # tensors
    activations: int  # saved for backward: neither parameters, buffers nor the images
    working: int  # more than that at the worst moment of forward and backward
    logit_bytes: int  # of one logit
    num_features: int  # D of the final pass; 0 where the network does not end in a linear layer


def network_of(config: Config, rows: int) -> Network:
    """Measure the config's network, on the device that `run.device` stands for (`auto`: CUDA)."""
    on_gpu = config.run.device != "cpu"
    return _measure(
        config.model.name,
        config.data.num_classes,
        config.model.cifar_stem,
        config.data.image_size,
        rows,
        on_gpu,
        on_gpu and config.train.amp != "none",
    )


@lru_cache(maxsize=256)
def _measure(
    name: str, num_classes: int, cifar_stem: bool, size: int, rows: int, on_gpu: bool, amp: bool
) -> Network:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision about its initialisation
            model = build_on_meta(name, num_classes, cifar_stem=cifar_stem)
            image = torch.empty(rows, 3, size, size, device="meta")
            label = torch.empty(rows, dtype=torch.int64, device="meta")
            saved, peak, output = step_bytes(model, image, label)
            working, logit_bytes = peak - saved, output.element_size()
            if on_gpu:
                saved, logit_bytes = _saved_on_cuda(model, image, amp)
    except InputError:
        raise
    except Exception as error:  # torchvision's networks say in many ways that an image is too small
        raise InputError(
            f"model.name={name} cannot train on {rows} images of {size}x{size} per rank and step"
            f" ({error}); use another data.image_size, network, or a larger train.global_batch_size"
        ) from error
    last = classifier_layer(model, num_classes)
    parameters, buffers = list(model.parameters()), list(model.buffers())
    return Network(
        tensor_bytes(parameters),
        tensor_bytes(buffers),
        len(parameters),
        len(buffers),
        saved,
        working,
        logit_bytes,
        last.in_features if last is not None else 0,
    )


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors that share no memory."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def step_bytes(model: nn.Module, image: Tensor, label: Tensor) -> tuple[int, int, Tensor]:
    """Return (saved for backward, most that is alive at once, output) of forward and backward on
    any device; bytes.

    Parameters, their gradients (DDP's buckets hold them all the time), buffers and the images are
    not counted.
    """
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    model.train()
    lasting = [
        *model.parameters(),
        *model.buffers(),
        image,
        label,
        *(p.grad for p in model.parameters() if p.grad is not None),
    ]
    with _Alive(lasting) as alive:
        saved, output = saved_bytes(model, image)
        F.cross_entropy(output.float(), label, reduction="none").sum().backward()
    return saved, alive.peak_bytes, output


def saved_bytes(model: nn.Module, image: Tensor) -> tuple[int, Tensor]:
    """Return (bytes of the distinct storages that a forward pass saves for backward, its
    output)."""
    known = {_key(tensor) for tensor in (*model.parameters(), *model.buffers(), image)}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if (key := _key(tensor)) not in known:
            found[key] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(image)
    if not isinstance(output, Tensor):
        raise InputError(
            f"model.name={type(model).__name__} gives several outputs in training; use a network"
            " with one"
        )
    return sum(found.values()), output


def _saved_on_cuda(model: nn.Module, image: Tensor, amp: bool) -> tuple[int, int]:
    """Return (bytes saved for backward on CUDA, bytes of a logit), also without a CUDA device.
    Attention counts unfused: an upper bound.

    `torch.autocast` refuses to work without a device, hence the switches that it sets.
    """
    with FakeTensorMode():
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        fake: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                        if isinstance(tensor, nn.Parameter):
                            fake = nn.Parameter(fake, tensor.requires_grad)
                        tensors[name] = fake  # type: ignore[assignment]
        torch.set_autocast_dtype("cuda", torch.bfloat16)  # float16 takes as much
        torch.set_autocast_enabled("cuda", amp)
        try:
            saved, output = saved_bytes(model, torch.empty(image.shape, device="cuda"))
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.clear_autocast_cache()
    return saved, output.element_size()


class _Alive(TorchDispatchMode):
    """Follows the bytes of all storages that operations make, until they are gone."""

    def __init__(self, lasting: list[Tensor]):
        super().__init__()
        self._lasting = {_key(tensor) for tensor in lasting}
        self._bytes: dict[int, int] = {}
        self._now_bytes = self.peak_bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if (
                isinstance(tensor, Tensor)
                and (key := _key(tensor)) not in self._bytes
                and key not in self._lasting
            ):
                storage = tensor.untyped_storage()
                self._bytes[key] = storage.nbytes()
                self._now_bytes += storage.nbytes()
                self.peak_bytes = max(self.peak_bytes, self._now_bytes)
                weakref.finalize(storage, self._forget, key)
        return result

    def _forget(self, key: int) -> None:
        self._now_bytes -= self._bytes.pop(key)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def optimizer_bytes(train: Train, parameter_bytes: int) -> int:
    """Return the bytes of the optimizer's state on the device."""
    if train.optimizer == "adamw":
        return 2 * parameter_bytes
    return parameter_bytes if train.momentum else 0


# ---- files, and host memory that follows from them


def trajectory_bytes(config: Config, num_samples: int) -> int:
    """Return the bytes of one epoch of the trajectory, without the few hundred of file headers and
    checksums."""
    if not config.score.trajectory:
        return 0
    num_scalars = len(SCALARS) + (config.prune.method != "none")
    return num_samples * num_scalars * _BYTES_OF[config.score.trajectory_dtype]


def model_file_bytes(network: Network) -> int:
    """Return the bytes of models/final.pt, and of models/best.pt."""
    num_tensors = network.num_parameters + network.num_buffers
    return network.parameters + network.buffers + num_tensors * _MODEL_FILE_BYTES


def checkpoint_bytes(config: Config, network: Network, num_samples: int, world_size: int) -> int:
    """Return the bytes of a checkpoint on disk; `num_samples` is 0 in retraining, which has no
    scorer."""
    own = network.buffers + _RANDOM_STATE_BYTES
    num_replicated = network.num_parameters * (2 + 2 * (config.train.optimizer == "adamw"))
    # marks are three of them
    num_tables = len(_row_bytes(config)) + 2 if num_samples else 0
    num_tensors = num_replicated + world_size * (network.num_buffers + 2 + num_tables)
    return (
        _replicated_bytes(config, network)
        + num_samples * sum(_row_bytes(config).values())
        + world_size * own
        # the last: best.pt, which is linked
        + num_tensors * _TENSOR_FILE_BYTES
        + model_file_bytes(network)
    )


def share_bytes(
    config: Config, network: Network, num_samples: int, world_size: int, rank: int = 0
) -> int:
    """Return the bytes of tensors that a rank writes of a checkpoint: its rows, what is its own,
    and about as much as others of what all hold alike."""
    first, end = shard_bounds(num_samples, world_size, rank)
    return (
        (end - first) * sum(_row_bytes(config).values())
        + network.buffers
        + _RANDOM_STATE_BYTES
        + _replicated_bytes(config, network) // world_size
    )


def staged_bytes(config: Config, network: Network, num_samples: int, world_size: int) -> int:
    """Return the host bytes that a rank takes while a checkpoint is written.

    In the background all of the rank's state is copied and stays; torch's writer then takes 40 MB,
    whatever the size (measured on the CPU). Otherwise the writer copies one tensor at a time, the
    largest being the log-probabilities.
    """
    own = shard_bounds(num_samples, world_size, 0)[1]
    if not config.checkpoint.asynchronous:
        return own * _row_bytes(config)["logp"]
    return (
        _replicated_bytes(config, network)
        + network.buffers
        + own * sum(_row_bytes(config).values())
        + 40_000_000
    )


def _replicated_bytes(config: Config, network: Network) -> int:
    """Return the bytes of what all ranks hold alike between two steps."""
    return network.parameters + optimizer_bytes(config.train, network.parameters)
