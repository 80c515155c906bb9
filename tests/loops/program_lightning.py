"""Train a tiny network with lightning.Trainer, scored, and keep every row that it saw.

program_lightning.py FOLDER KIND STOP_AT_EPOCH(0: never) [resume]
"""

import os
import sys
from pathlib import Path

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tdds_dist import Window
from tdds_dist.loops.lightning import Score

N, C, BATCH, EPOCHS = 43, 5, 4, 4
WINDOWS = [Window(T=4, K=3, beta=0.9), Window(T=3, K=3, beta=0.5)]
folder, kind, stop_at = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
rank = int(os.environ.get("RANK", "0"))
rng = np.random.default_rng(0)
label_N = rng.integers(C, size=N)
image_NX = (rng.normal(size=(N, 5)) + label_N[:, None]).astype("float32")


class Network(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, C))

    def training_step(self, batch, step):
        image, label, index = batch
        logits = self.layers(image)
        name = f"seen_{self.current_epoch:02d}_{step:03d}_{rank}.npz"
        np.savez(folder / name, index=index.numpy(), logits=logits.detach().float().numpy())
        loss = nn.functional.cross_entropy(logits.float(), label)
        return {"loss": loss, "index": index, "logits": logits, "label": label}

    def validation_step(self, batch, step):
        if stop_at == self.current_epoch and stop_at:
            torch.distributed.is_initialized() and torch.distributed.barrier()
            os._exit(7)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


lightning.seed_everything(0)
dataset = TensorDataset(torch.from_numpy(image_NX), torch.from_numpy(label_N), torch.arange(N))
score = Score(WINDOWS, out=folder / "scored")
keep = ModelCheckpoint(folder, save_last=True, save_top_k=1, monitor=None,
                       save_on_train_epoch_end=kind != "after validation")  # fmt: skip
trainer = lightning.Trainer(
    accelerator="cpu",
    devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
    max_epochs=EPOCHS,
    accumulate_grad_batches=2,
    precision="bf16-mixed" if kind == "bfloat16" else "32-true",
    callbacks=[score, keep] if kind != "unscored" else [],
    enable_checkpointing=kind != "unscored",
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    num_sanity_val_steps=0,
)
model = Network()
loaders = DataLoader(dataset, BATCH, shuffle=True), DataLoader(dataset, BATCH)
trainer.fit(model, *loaders, ckpt_path=folder / "last.ckpt" if "resume" in sys.argv[4:] else None)
weights = torch.cat([value.flatten() for value in model.state_dict().values()])
if rank == 0:
    scores = {f"T{window.T}": score_N.numpy() for window, score_N in score.scores.items()}
    np.savez(folder / "result.npz", weights=weights.detach().numpy(), label=label_N, **scores)
if torch.distributed.is_initialized():
    torch.distributed.barrier()
    os._exit(0)
