"""TDDS with Lightning: a callback for any module whose training_step returns its logits. Runs alone or under torchrun.

    python docs/examples/lightning_loop.py
    torchrun --nproc-per-node 2 docs/examples/lightning_loop.py
"""
import os

import lightning
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from tdds_dist import ShardedScorer, Window


class Score(lightning.Callback):
    """Scores every sample of a training; `scores` holds the result, by global index."""

    def __init__(self, window, num_samples, num_classes):
        self.window, self.num_samples, self.num_classes = window, num_samples, num_classes

    def on_train_start(self, trainer, module):  # there is a process group by now
        self.scorer = ShardedScorer(self.num_samples, self.num_classes, [self.window], device=module.device)

    def on_train_batch_end(self, trainer, module, outputs, batch, step):
        _, label, index = batch
        row = torch.arange(len(index), device=index.device) + step * trainer.train_dataloader.batch_size
        is_repeat = row * trainer.world_size + trainer.global_rank >= self.num_samples  # Lightning's sampler evens the ranks
        self.scorer.record(index.masked_fill(is_repeat, -1), outputs["logits"], label)

    def on_train_epoch_end(self, trainer, module):
        self.scorer.end_epoch()

    def on_train_end(self, trainer, module):
        self.scores = self.scorer.gather()[self.window]
        del self.scorer  # it holds the process group, which Lightning ends


class Digits(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))

    def training_step(self, batch, step):
        logits = self.network(batch[0])
        return {"loss": torch.nn.functional.cross_entropy(logits, batch[1]), "logits": logits.detach()}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


image, label = (torch.tensor(array) for array in load_digits(return_X_y=True))
dataset = TensorDataset(image.float() / 16, label, torch.arange(len(label)))  # the third is the global index
score = Score(Window(T=12, K=5, beta=0.9), num_samples=len(label), num_classes=10)
trainer = lightning.Trainer(accelerator="cpu", devices=int(os.environ.get("LOCAL_WORLD_SIZE", 1)), max_epochs=12,
                            callbacks=[score], logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
trainer.fit(Digits(), DataLoader(dataset, 64, shuffle=True))
if trainer.is_global_zero:
    print(f"scored {len(score.scores)} images; kept first: {score.scores.argsort(descending=True)[:5].tolist()}")
