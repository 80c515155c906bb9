"""TDDS with Lightning: a callback, for any module whose training_step says what it saw. Runs alone or under torchrun.

    python docs/examples/lightning_loop.py
    torchrun --nproc-per-node 2 docs/examples/lightning_loop.py
"""
import os

import lightning
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from tdds_dist import Window
from tdds_dist.loops.lightning import Score


class Digits(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))

    def training_step(self, batch, step):
        image, label, index = batch
        logits = self.network(image)
        loss = torch.nn.functional.cross_entropy(logits, label)
        return {"loss": loss, "index": index, "logits": logits, "label": label}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


image, label = (torch.tensor(array) for array in load_digits(return_X_y=True))
dataset = TensorDataset(image.float() / 16, label, torch.arange(len(label)))  # the third is the global index
score = Score([Window(T=12, K=5, beta=0.9)])
trainer = lightning.Trainer(accelerator="cpu", devices=int(os.environ.get("LOCAL_WORLD_SIZE", 1)), max_epochs=12,
                            callbacks=[score], logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
trainer.fit(Digits(), DataLoader(dataset, 64, shuffle=True))
if trainer.is_global_zero:
    (score_N,) = score.scores.values()
    print(f"scored {len(score_N)} images; kept first: {score_N.argsort(descending=True)[:5].tolist()}")
