"""Scores of a training by lightning.Trainer are those of a plain loop over what it saw."""

import shutil
from functools import partial

import numpy as np
import pytest
import torch

from tdds_dist import InputError, Window
from tests.loops import plain

pytestmark = pytest.mark.loops
lightning = pytest.importorskip("lightning")
run = partial(plain.run, "program_lightning.py")


@pytest.mark.parametrize(
    ("ranks", "kind"), [(1, "after validation"), (1, "bfloat16"), (2, "plain")]
)
def test_scores_are_those_of_a_plain_loop_also_over_a_resume(ranks, kind, tmp_path):
    """Stopped in the validation of its third epoch it goes on from the end of the second, before
    which the checkpoint is saved or after. Of older checkpoints no state is left."""
    folder = tmp_path / "run"
    run(ranks, folder, kind, 2, code=7)
    run(ranks, folder, kind, 0, "resume")
    plain.check(folder, ranks)
    states = {path.name.removesuffix(".scores") for path in folder.glob("*.scores")}
    assert states == {path.name for path in folder.glob("*.ckpt")} != set()


def test_training_is_as_without(tmp_path):
    for kind in ("plain", "unscored"):
        run(1, tmp_path / kind, kind, 0)
    plain.check(tmp_path / "plain", 1)
    scored, unscored = (
        np.load(tmp_path / kind / "result.npz")["weights"] for kind in ("plain", "unscored")
    )
    assert scored.tobytes() == unscored.tobytes()


def fit(folder, outputs=lambda step: step, loader=None, ckpt=None, callbacks=(), **settings):
    """Train for three epochs on eight samples; return what holds the scores."""
    from tdds_dist.loops.lightning import Score

    class Network(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 3)

        def training_step(self, batch, step):
            logits, label = self.layer(batch[0]), batch[0][:, 0].long() % 3
            loss = torch.nn.functional.cross_entropy(logits, label)
            step = {"loss": loss, "index": batch[1], "logits": logits, "label": label}
            return outputs(step)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    dataset = torch.utils.data.TensorDataset(torch.arange(16.0).view(8, 2), torch.arange(8))
    loader = loader or torch.utils.data.DataLoader
    score = Score([Window(3, 3, 0.9)], folder / "scored")
    quiet = ("logger", "enable_progress_bar", "enable_model_summary")
    settings = {"max_epochs": 3, "enable_checkpointing": bool(callbacks)} | settings
    trainer = lightning.Trainer(
        accelerator="cpu", callbacks=[score, *callbacks], **dict.fromkeys(quiet, False), **settings
    )
    trainer.fit(Network(), loader(dataset, batch_size=4), ckpt_path=ckpt)
    return score


def test_a_checkpoint_within_an_epoch_is_no_place_to_go_on_from(tmp_path):
    keep = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=3)
    fit(tmp_path / "a", callbacks=[keep], max_steps=3, max_epochs=-1)
    with pytest.raises(InputError, match="was saved in the middle of an epoch"):
        fit(tmp_path / "a", ckpt=next(tmp_path.glob("*.ckpt")))


def test_the_state_of_another_checkpoint_is_refused(tmp_path):
    """As it was left by a process that ended between the two; nor does one stay that is of an
    older checkpoint of that name."""
    keep = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1)
    fit(tmp_path / "a", callbacks=[keep])
    first, second, _ = sorted(tmp_path.glob("*.ckpt"))
    shutil.rmtree(f"{second}.scores")
    shutil.copytree(f"{first}.scores", f"{second}.scores")
    with pytest.raises(InputError, match=r"is the state after 2 batches, and .* that after 4"):
        fit(tmp_path / "a", ckpt=second)


def test_checkpoints_without_a_training_that_is_recorded_have_no_state(tmp_path):
    """Lightning saves the last one after our end."""
    keep = lightning.pytorch.callbacks.ModelCheckpoint(
        tmp_path, save_last=True, every_n_epochs=10, save_top_k=1
    )
    assert len(fit(tmp_path / "a", callbacks=[keep]).scores) == 1
    assert [*tmp_path.glob("*.scores")] == []


def test_a_link_to_the_last_checkpoint_leads_to_its_state(tmp_path):
    keep = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, save_last="link", save_top_k=-1)
    fit(tmp_path / "a", callbacks=[keep], max_epochs=3)
    assert (tmp_path / "last.ckpt").is_symlink()
    scores = fit(tmp_path / "a", ckpt=tmp_path / "last.ckpt", max_epochs=4).scores
    assert [len(score_N) for score_N in scores.values()] == [8]


def test_training_that_ends_early_gives_no_scores(tmp_path, caplog):
    assert fit(tmp_path, max_steps=5, max_epochs=-1).scores == {}
    assert "training ended after 2 whole epochs" in caplog.text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"outputs": lambda step: step["loss"]},
            "returned loss; it must return a dict with loss",
        ),
        (
            {"outputs": lambda step: {"loss": step["loss"], "logits": step["logits"]}},
            "returned loss, logits; .* \\(index, label missing\\)",
        ),
        (
            {"outputs": lambda step: step | {"logits": step["logits"][:, None]}},
            r"logits \(4, 1, 3\), index .* scores are of one label per sample",
        ),
        ({"max_epochs": 2}, "max_epochs=2 are fewer than the longest window's T=3"),
        ({"limit_train_batches": 1}, "1 batches of 4 on 1 ranks are not the 8 samples"),
        (
            {"loader": lambda dataset, batch_size: [torch.zeros(1)]},
            "the training loader is a list of a NoneType; give one DataLoader",
        ),
    ],
)
def test_refused(tmp_path, options, words):
    with pytest.raises(InputError, match=words):
        fit(tmp_path, **options)
