"""Train a tiny network with transformers.Trainer, scored, and keep every row that it saw.

program_hugging_face.py FOLDER KIND STOP_AT_STEP(0: never) [resume]
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from tdds_dist import Window
from tdds_dist.loops.hugging_face import record

N, C, BATCH, EPOCHS = 43, 5, 4, 4
WINDOWS = [Window(T=4, K=3, beta=0.9), Window(T=3, K=3, beta=0.5)]
folder, kind, stop_at = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
rank = int(os.environ.get("RANK", "0"))
rng = np.random.default_rng(0)
label_N = rng.integers(C, size=N)
image_NX = (rng.normal(size=(N, 6)) + label_N[:, None]).astype("float32")
image_NX[:, 0] = np.arange(N)  # by which this program knows them


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, C))

    def forward(self, image, labels=None):
        logits = self.layers(image[:, 1:])
        if self.training:
            keep(image[:, 0].long(), logits)
        loss = nn.functional.cross_entropy(logits.float(), labels)
        return {"loss": loss, "logits": logits}


def keep(index, logits):
    step, same = trainer.state.global_step, 0
    while (path := folder / f"seen_{step:03d}_{same}_{rank}.npz").exists() and path in kept:
        same += 1
    kept.add(path)
    np.savez(path, index=index.numpy(), logits=logits.detach().float().numpy())


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == stop_at:
            torch.distributed.is_initialized() and torch.distributed.barrier()
            os._exit(7)


kept = set()
torch.manual_seed(0)
rows = [
    {"image": image, "labels": int(label)} for image, label in zip(image_NX, label_N, strict=True)
]
if kind == "datasets":
    import datasets

    rows = datasets.Dataset.from_list(rows).with_format("torch")
arguments = TrainingArguments(
    output_dir=str(folder / "trainer"),
    per_device_train_batch_size=BATCH,
    gradient_accumulation_steps=2,
    num_train_epochs=EPOCHS,
    learning_rate=0.05,
    save_steps=4,
    eval_strategy="epoch",
    bf16=kind == "bfloat16",
    use_cpu=True,
    report_to=[],
    disable_tqdm=True,
    seed=3,
)
trainer = Trainer(Network(), arguments, train_dataset=rows, eval_dataset=rows, callbacks=[Stop()])
if kind != "unscored":
    recorder = record(trainer, WINDOWS, out=folder / "scored")
trainer.train(resume_from_checkpoint="resume" in sys.argv[4:])
weights = torch.cat([value.flatten() for value in trainer.model.state_dict().values()])
if rank == 0:
    scores = (
        {} if kind == "unscored" else {f"T{w.T}": s.numpy() for w, s in recorder.scores.items()}
    )
    np.savez(folder / "result.npz", weights=weights.detach().numpy(), label=label_N, **scores)
if torch.distributed.is_initialized():
    torch.distributed.barrier()
    os._exit(0)
