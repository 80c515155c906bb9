"""What only CUDA would show, seen without a GPU: torch's fake tensors say that they lie on `cuda`,
and hold no values."""

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tdds_dist.training import state


def test_saved_weights_load_on_a_machine_without_cuda(tmp_path):
    with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):
        with torch.device("cuda"):
            model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        state.save_weights(model, tmp_path / "final.pt")
        assert model[0].weight.device.type == "cuda", "the model stays where it is"
    weights = torch.load(tmp_path / "final.pt", weights_only=True)
    assert {name: (value.shape, value.device.type) for name, value in weights.items()} == {
        name: (value.shape, "cpu") for name, value in model.state_dict().items()
    }
