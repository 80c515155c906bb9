"""Metrics of an epoch: accuracy on the evaluation file, memory, one line for people."""

# B rows of this rank and forward pass, C classes, k best guesses

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tdds_dist.console import Progress
from tdds_dist.distributed import collectives
from tdds_dist.distributed.host_memory import resident_bytes
from tdds_dist.text import duration


class Accuracy:
    """Loss and top-1 and top-5 accuracy, and loss and recall of each class; summed on the device
    without a wait until `read`."""

    def __init__(self, num_classes: int, device: torch.device):
        # of each class: loss, right, images
        self._classes_C3 = torch.zeros(num_classes, 3, dtype=torch.float64, device=device)
        # loss, right, among the best five, images
        self._totals_4 = torch.zeros(4, dtype=torch.float64, device=device)

    def add(self, logits_BC: Tensor, label_B: Tensor, real_B: Tensor) -> None:
        """Count the rows that `real_B` marks."""
        top_Bk = logits_BC.topk(min(5, logits_BC.shape[1]), dim=1).indices == label_B[:, None]
        loss_B = F.cross_entropy(logits_BC, label_B, reduction="none")
        of_image_B3 = torch.stack([loss_B, top_Bk[:, 0], torch.ones_like(loss_B)], dim=1)
        self._classes_C3.index_add_(0, label_B, of_image_B3.double() * real_B[:, None])
        self._totals_4 += torch.stack(
            [
                (loss_B * real_B).sum(),
                (top_Bk[:, 0] & real_B).sum(),
                (top_Bk.any(dim=1) & real_B).sum(),
                real_B.sum(),
            ]
        )

    def read(self) -> tuple[dict[str, float], Tensor]:
        """Return mean loss, and percent, over all ranks; and mean loss and recall of each class,
        float64 [2, C], NaN without images. A collective that waits for the device."""
        sums = torch.cat([self._totals_4, self._classes_C3.flatten()])
        sums = collectives.sum_over_ranks(sums)
        loss, top1, top5, images = sums[:4].tolist()
        sum_3C = sums[4:].view(-1, 3).T
        record = {
            "val_loss": loss / images,
            "val_top1": 100.0 * top1 / images,
            "val_top5": 100.0 * top5 / images,
        }
        return record, sum_3C[:2] / sum_3C[2]  # 0 / 0 is NaN


class Screen:
    """The one bar of a training, over all its epochs, with what was last read of it. Reads nothing
    from the device itself.

    epochs: of the schedule; epoch: where it begins; num_images: of all epochs that will run; done:
    images that an earlier start has seen.
    """

    def __init__(self, epochs: int, epoch: int, num_images: int, visible: bool, done: int):
        self._epochs, self._figures = epochs, ""
        self._epoch = f"epoch {min(epoch + 1, epochs)}/{epochs}"
        self.progress = Progress("training", num_images, "", visible, done, self._epoch)

    def begin_epoch(self, epoch: int) -> None:
        """Show that epoch `epoch`, counted from 0, starts or goes on."""
        self._epoch = f"epoch {epoch + 1}/{self._epochs}"
        self.progress.note(self._epoch + self._figures)

    def figures(self, loss: float, top1: float, images_per_second: float) -> None:
        """Show the numbers of the epoch so far; top-1 in percent."""
        self._figures = f", {images_per_second:,.0f} images/s, loss {loss:.3f}, top-1 {top1:.2f} %"
        self.progress.note(self._epoch + self._figures)

    def evaluating(self) -> None:
        """Show that evaluation runs; no image counts until the next epoch."""
        self.progress.note(f"{self._epoch}{self._figures}, evaluation", now=True)

    def evaluated(self, top1: float) -> None:
        """Show the result of the evaluation, percent."""
        self._figures += f", val top-1 {top1:.2f} %"


def memory_bytes(device: torch.device) -> int:
    """Return the peak device memory on CUDA, resident memory of this process on the CPU; bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resident_bytes()


def epoch_line(record: dict[str, Any], epochs: int, remaining_seconds: float) -> str:
    """Write an epoch's record as a line for the screen and the log."""
    evaluation = f"val top-1 {record['val_top1']:5.2f} %  " if "val_top1" in record else ""
    eta = f"  {duration(remaining_seconds)} left" if remaining_seconds else ""
    return (
        f"epoch {record['epoch'] + 1:3d}/{epochs}  loss {record['train_loss']:.4f}  train top-1"
        f" {record['train_top1']:5.2f} %  {evaluation}{record['images_per_second']:.0f}"
        f" images/s{eta}"
    )
