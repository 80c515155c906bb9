"""Scores of a training by transformers.Trainer are those of a plain loop over what it saw."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tdds_dist import InputError, ShardedScorer, Window, load_scores
from tdds_dist.scoring.trajectory import Trajectory

pytestmark = pytest.mark.loops
ROOT, PROGRAM = Path(__file__).parents[2], Path(__file__).parent / "program_hugging_face.py"
N, C, BATCH, EPOCHS = 43, 5, 4, 4
WINDOWS = [Window(T=4, K=3, beta=0.9), Window(T=3, K=3, beta=0.5)]


def run(ranks, folder, *words, code=0):
    folder.mkdir(exist_ok=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [sys.executable, *launcher * (ranks > 1), str(PROGRAM), str(folder), *map(str, words)],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == (code and (1 if ranks > 1 else code)), done.stderr
    return done


def plain(folder, ranks):
    """The scores of a plain loop over the same forward passes; a sample that accelerate repeats at
    the end of an epoch counts where it came first."""
    scorer = ShardedScorer(N, C, WINDOWS, device="cpu")
    per_epoch = -(-N // (BATCH * ranks))
    files = sorted(folder.glob("seen_*.npz"))
    steps = [files[at : at + ranks] for at in range(0, len(files), ranks)]
    assert len(steps) == EPOCHS * per_epoch
    label_N = np.load(folder / "result.npz")["label"]
    for epoch in range(EPOCHS):
        seen = set()
        for paths in steps[epoch * per_epoch :][:per_epoch]:
            for path in paths:
                with np.load(path) as rows:
                    index_B, logits_BC = rows["index"], torch.from_numpy(rows["logits"])
                is_first_B = [not (index in seen or seen.add(index)) for index in index_B.tolist()]
                label_B = torch.from_numpy(label_N[index_B])
                index_B = torch.from_numpy(np.where(is_first_B, index_B, -1))
                scorer.record(index_B, logits_BC, label_B)
        scorer.end_epoch()
    return {f"T{window.T}": score_N.numpy() for window, score_N in scorer.gather().items()}


def check(folder, ranks):
    expected, found = plain(folder, ranks), np.load(folder / "result.npz")
    for window in WINDOWS:
        key = f"T{window.T}"
        assert found[key].tobytes() == expected[key].tobytes(), key
        written = load_scores(folder / "scored" / "scores" / f"{window.key('official')}.npz")
        assert written.score_N.tobytes() == expected[key].tobytes()
        assert written.label_N.tolist() == found["label"].tolist()
    assert len(Trajectory(folder / "scored" / "trajectory").read("p_label")) == EPOCHS


@pytest.mark.parametrize(("ranks", "kind"), [(1, "list"), (1, "bfloat16"), (2, "datasets")])
def test_scores_are_those_of_a_plain_loop_also_over_a_resume(ranks, kind, tmp_path):
    """Stopped after its 13th step, within the third epoch on one rank, it goes on from the 12th."""
    run(ranks, tmp_path / "whole", kind, 0)
    check(tmp_path / "whole", ranks)
    run(ranks, tmp_path / "stopped", kind, 13 // ranks, code=7)
    run(ranks, tmp_path / "stopped", kind, 0, "resume")
    check(tmp_path / "stopped", ranks)


def test_training_is_as_without(tmp_path):
    for kind in ("list", "unscored"):
        run(1, tmp_path / kind, kind, 0)
    scored, unscored = (
        np.load(tmp_path / kind / "result.npz")["weights"] for kind in ("list", "unscored")
    )
    assert scored.tobytes() == unscored.tobytes()


def trainer(folder, windows, network="", collator=None, **settings):
    """A trainer that is scored, of a network that gives what it is told to."""
    from transformers import Trainer, TrainingArguments

    from tdds_dist.loops.hugging_face import record

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, C)

        def forward(self, image, labels=None):
            logits = self.layer(image)
            if network == "tokens":
                logits = logits[:, None]
            return {"loss": logits.sum(), "logits": logits}

    rows = [{"image": torch.ones(2), "labels": index % C} for index in range(8)]
    arguments = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, **settings
    )
    made = Trainer(Network(), arguments, train_dataset=rows, data_collator=collator)
    return made, record(made, windows)


def drops_columns(rows):
    return {
        "image": torch.stack([row["image"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dataloader_drop_last": True}, "dataloader_drop_last=True: samples would not come once"),
        ({"accelerator_config": {"even_batches": False}}, "accelerator_config.even_batches=False"),
        ({"num_train_epochs": 2}, "num_train_epochs=2 ends before the longest window, T=3"),
        ({"collator": drops_columns}, "data_collator must keep this column of the training set"),
        ({"network": "tokens"}, "logits (8, 1, 5) and labels (8,) of 8 samples"),
    ],
)
def test_what_is_refused(settings, said, tmp_path):
    with pytest.raises(InputError, match=r"all scores are 0; raise K"):
        trainer(tmp_path, [Window(3, 2, 0.9)])
    with pytest.raises(InputError, match=re.escape(said)):
        trainer(tmp_path, [Window(3, 3, 0.9)], **settings)[0].train()


def test_what_ends_early_has_no_scores(tmp_path, caplog):
    """And a checkpoint of a training without scores is no place to go on from."""
    made, recorder = trainer(
        tmp_path, [Window(3, 3, 0.9)], max_steps=5, per_device_train_batch_size=4
    )
    made.train()
    assert recorder.scores == {}
    assert "training ended after 2 whole epochs and a part: no scores" in caplog.text
    shutil.rmtree(tmp_path / "checkpoint-5" / "tdds")
    with pytest.raises(InputError, match="checkpoint-5 holds no tdds/, the state of the scores"):
        made.train(resume_from_checkpoint=True)
