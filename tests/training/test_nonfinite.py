"""Steps and batch-norm statistics that are left out: bit for bit as one tensor after the other, in a
number of operations that does not grow with the network."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tdds_dist.distributed import collectives
from tdds_dist.distributed import world as distributed
from tdds_dist.training import nonfinite
from tests.ranks import run_ranks


def network(num_layers, seed=0):
    torch.manual_seed(seed)
    layers = [
        layer
        for _ in range(num_layers)
        for layer in (nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
    ]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def one_by_one(model, good_buffers):
    """What is to come out: the same decisions, tensor by tensor."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    is_finite = torch.isfinite(torch.stack([torch.linalg.vector_norm(g) for g in gradients])).all()
    for gradient in gradients:
        gradient.copy_(torch.where(is_finite, gradient, 0.0))
    for buffer, good in zip(model.buffers(), good_buffers, strict=True):
        buffer.copy_(torch.where(torch.isfinite(buffer).all(), buffer, good))
        good.copy_(buffer)


STEPS = {  # a value, where it goes: gradients of a parameter or buffers, by number
    "all finite": [],
    "NaN gradient": [("gradient", 3, torch.nan)],
    "infinite gradient": [("gradient", 0, -torch.inf)],
    "its norm overflows": [("gradient", 2, 3e38)],
    "NaN statistics": [("buffer", 1, torch.nan)],
    "infinite statistics, others large": [("buffer", 0, torch.inf), ("buffer", 4, 3e38)],
    "both": [("gradient", 1, torch.nan), ("buffer", 3, -torch.inf)],
}


@pytest.mark.distributed
def test_the_bits_are_those_of_one_tensor_after_the_other():
    run_ranks(1, _steps)


def _steps(rank):
    replicas = collectives.data_parallel(network(3), distributed.current_world("cpu"))
    model, good = replicas.module, nonfinite.GoodBuffers(replicas.module)
    literal_good = [buffer.clone() for buffer in model.buffers()]
    for name, faults in STEPS.items():
        model.zero_grad(set_to_none=True)
        replicas(torch.randn(2, 4, 8, 8)).square().sum().backward()
        places = {"gradient": [p.grad for p in model.parameters()], "buffer": [*model.buffers()]}
        for kind, number, value in faults:
            places[kind][number][(0,) * places[kind][number].ndim] = value
        literal = copy.deepcopy(model)
        for ours, theirs in zip(model.parameters(), literal.parameters(), strict=True):
            theirs.grad = ours.grad.clone()
        before = state_of(model)
        one_by_one(literal, literal_good)
        nonfinite.drop_gradients(model.parameters())
        good.restore()
        after = state_of(model)
        assert is_same(after, state_of(literal)), name
        assert is_same(after, before) is (not faults), name
        assert all(torch.isfinite(value).all() for value in after), name


def is_same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def state_of(model):
    return [value.clone() for value in (*(p.grad for p in model.parameters()), *model.buffers())]


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += 1
        return function(*arguments, **(options or {}))


@pytest.mark.distributed
def test_operations_do_not_grow_with_the_layers():
    few, many = run_ranks(1, _operations)[0]
    assert few == many <= 20


def _operations(rank):
    counts = []
    for num_layers in (2, 40):
        replicas = collectives.data_parallel(network(num_layers), distributed.current_world("cpu"))
        good = nonfinite.GoodBuffers(replicas.module)
        replicas(torch.randn(2, 4, 8, 8)).sum().backward()  # into a single bucket
        with Operations() as operations:
            nonfinite.drop_gradients(replicas.parameters())
            good.restore()
        counts.append(operations.count)
    return counts
