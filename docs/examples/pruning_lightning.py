"""Skip images on the way with Lightning: the module makes the loader of each epoch. Runs alone or under torchrun.

    python docs/examples/pruning_lightning.py
    torchrun --nproc-per-node 2 docs/examples/pruning_lightning.py
"""

import os

import lightning
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from tdds_dist import PruningPlan, PruningSchedule, ShardedScorer, Window, epoch_order

EPOCHS, BATCH, C = 12, 64, 10  # images of a step, over all ranks
image, label = (torch.tensor(array) for array in load_digits(return_X_y=True))
N, dataset = len(label), TensorDataset(image.float() / 16, label)


class Digits(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.network, self.seen = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, C)), 0

    def setup(self, stage):  # there is a process group by now
        self.scorer = ShardedScorer(N, C, [Window(T=EPOCHS, K=5, beta=0.9)], device="cpu", partial_epochs=True)
        self.schedule = PruningSchedule(PruningPlan("progressive", N, EPOCHS, rate=0.5), self.scorer)

    def train_dataloader(self):  # before each epoch, on every rank
        visits = self.schedule.decide(self.scorer.epoch)
        num = N if visits.subset_M is None else len(visits.subset_M)
        order = epoch_order(num, BATCH, epoch=self.scorer.epoch, subset=visits.subset_M)
        self.scorer.expect(order)
        self.weight = torch.ones(N) if visits.weight_N is None else torch.from_numpy(visits.weight_N)
        samples, indices = order.of_rank(self.global_rank, self.trainer.world_size)
        self.indices = torch.from_numpy(indices.copy())  # of each step; -1 fills the last batch
        self.seen += num
        return DataLoader(dataset, batch_sampler=samples.tolist())

    def training_step(self, batch, step):
        logits, index = self.network(batch[0]), self.indices[step]
        self.scorer.record(index, logits.detach(), batch[1])
        return (torch.nn.functional.cross_entropy(logits, batch[1], reduction="none") * self.weight[index] * (index >= 0)).mean()

    def on_train_epoch_end(self):
        self.scorer.end_epoch()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


trainer = lightning.Trainer(accelerator="cpu", devices=int(os.environ.get("LOCAL_WORLD_SIZE", 1)), max_epochs=EPOCHS,
                            reload_dataloaders_every_n_epochs=1, use_distributed_sampler=False, logger=False,
                            enable_checkpointing=False, enable_progress_bar=False)
trainer.fit(module := Digits())
if trainer.is_global_zero:
    print(f"saw {module.seen} of {EPOCHS * N} images", flush=True)
os._exit(0)  # DDP leaves threads of gloo behind, which now and then abort Python's own way out
