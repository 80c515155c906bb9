"""Values that are not finite, which training leaves out (`score.on_nan=quarantine`): gradients of a
step, and batch-norm statistics.

Nothing is read from the device, and the number of operations does not grow with that of the layers.
"""

# B buffers, E elements of all of them

from collections.abc import Iterable

import torch
from torch import Tensor, nn


@torch.no_grad()
def drop_gradients(parameters: Iterable[Tensor]) -> None:
    """Set all gradients to zero where any value is not finite, so that momentum and decay go on."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    is_bad = torch.isfinite(torch.stack(torch._foreach_norm(gradients))).all().logical_not()
    # DDP lets them lie side by side in a few buckets
    buckets = {gradient.untyped_storage()._cdata: gradient for gradient in gradients}
    for gradient in buckets.values():
        size = gradient.untyped_storage().nbytes() // gradient.element_size()
        gradient.as_strided((size,), (1,), 0).masked_fill_(is_bad, 0.0)


class GoodBuffers:
    """The last finite values of a network's floating-point buffers, each by itself."""

    def __init__(self, model: nn.Module):
        self._buffers = [
            buffer for buffer in model.buffers() if buffer.is_floating_point() and buffer.numel()
        ]
        if not self._buffers:
            return
        sizes = [buffer.numel() for buffer in self._buffers]
        self._good_E = torch.cat([buffer.flatten() for buffer in self._buffers])
        self._now_E = self._good_E.clone()
        self._good_B, self._now_B = (
            [flat.view_as(b) for flat, b in zip(table.split(sizes), self._buffers, strict=True)]
            for table in (self._good_E, self._now_E)
        )
        of_element = torch.repeat_interleave(
            torch.arange(len(sizes)), torch.tensor(sizes), output_size=sum(sizes)
        )
        self._buffer_of_E = of_element.to(self._good_E.device)

    @torch.no_grad()
    def restore(self) -> None:
        """Give buffers that hold a value that is not finite their last good ones; note the
        others."""
        if not self._buffers:
            return
        # the largest absolute value, or NaN
        is_finite_B = torch.isfinite(torch.stack(torch._foreach_norm(self._buffers, torch.inf)))
        torch._foreach_copy_(self._now_B, self._buffers)
        is_finite_E = is_finite_B.index_select(0, self._buffer_of_E)
        torch.where(is_finite_E, self._now_E, self._good_E, out=self._good_E)
        torch._foreach_copy_(self._buffers, self._good_B)
