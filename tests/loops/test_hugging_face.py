"""Scores of a training by transformers.Trainer are those of a plain loop over what it saw."""

import re
import shutil
from functools import partial

import numpy as np
import pytest
import torch

from tdds_dist import InputError, Window
from tests.loops import plain

pytestmark = pytest.mark.loops
pytest.importorskip("transformers")
C = plain.C
run = partial(plain.run, "program_hugging_face.py")


@pytest.mark.parametrize(("ranks", "kind"), [(1, "list"), (1, "bfloat16"), (2, "datasets")])
def test_scores_are_those_of_a_plain_loop_also_over_a_resume(ranks, kind, tmp_path):
    """Stopped after its 13th step, within the third epoch on one rank, it goes on from the 12th."""
    run(ranks, tmp_path / "run", kind, 13 // ranks, code=7)
    run(ranks, tmp_path / "run", kind, 0, "resume")
    plain.check(tmp_path / "run", ranks)


def test_training_is_as_without(tmp_path):
    for kind in ("list", "unscored"):
        run(1, tmp_path / kind, kind, 0)
    plain.check(tmp_path / "list", 1)
    scored, unscored = (
        np.load(tmp_path / kind / "result.npz")["weights"] for kind in ("list", "unscored")
    )
    assert scored.tobytes() == unscored.tobytes()


class Network(torch.nn.Module):
    """Its outputs are of the kind that it is told to give."""

    def __init__(self, kind="dict"):
        super().__init__()
        self.layer, self.kind = torch.nn.Linear(2, C), kind

    def forward(self, image, labels=None):
        logits = self.layer(image)
        if self.kind == "tokens":
            logits = logits[:, None]
        if self.kind == "tuple without a loss":
            return logits, image
        if labels is None:
            return {"logits": logits}
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels)
        return {"loss": loss, "logits": logits}


def trainer(folder, windows, kind="dict", rows=None, record_too=True, **settings):
    """A trainer that is scored, and what holds its scores."""
    from transformers import Trainer, TrainingArguments

    from tdds_dist.loops.hugging_face import record

    names = ("data_collator", "compute_loss_func", "callbacks")
    parts = {name: settings.pop(name) for name in names if name in settings}
    rows = rows or [{"image": torch.arange(2.0) + index, "labels": index % C} for index in range(8)]
    settings = {"per_device_train_batch_size": 4, "num_train_epochs": 3, "seed": 1} | settings
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **settings,
    )
    torch.manual_seed(0)
    made = Trainer(Network(kind), arguments, train_dataset=rows, **parts)
    return made, record(made, windows, folder / "scored") if record_too else None


def scores_of(made, recorder):
    made.train()
    (score_N,) = recorder.scores.values()
    return score_N.tolist()


WINDOW = Window(3, 3, 0.9)


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """The scores of the trainer above."""
    return scores_of(*trainer(tmp_path_factory.mktemp("usual"), [WINDOW]))


def drops_columns(rows):
    return {
        "image": torch.stack([row["image"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def stops_epochs():
    from transformers import TrainerCallback

    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_epoch_stop = state.global_step == 1

    return Stops()


def datasets_rows():
    import datasets

    rows = [{"image": [index, index + 1.0], "labels": index % C} for index in range(8)]
    return datasets.Dataset.from_list(rows).with_format("torch")


REFUSED = {
    "dataloader_drop_last=True must be False": {"dataloader_drop_last": True},
    "accelerator_config.even_batches=False": {"accelerator_config": {"even_batches": False}},
    "are 2 whole epochs, fewer than the longest window's T=3": {"num_train_epochs": 2},
    "transforms of the training set, must keep this column": {"data_collator": drops_columns},
    "logits (4, 1, 5) and labels (4,) of 4 samples": {"kind": "tokens"},
    "an epoch ended after 1 of 2 batches": {"callbacks": [stops_epochs]},
    "gives a tuple for a sample; it must give a dict": {"rows": [(1, 2)] * 8},
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_is_refused(said, tmp_path):
    settings = REFUSED[said]
    if "callbacks" in settings:
        settings = {"callbacks": [make() for make in settings["callbacks"]]}
    with pytest.raises(InputError, match=re.escape(said)):
        trainer(tmp_path, [WINDOW], **settings)[0].train()


def test_what_is_refused_at_once(tmp_path):
    from tdds_dist.loops.hugging_face import record

    with pytest.raises(InputError, match=r"all scores are 0; raise K"):
        trainer(tmp_path, [Window(3, 2, 0.9)])
    with pytest.raises(InputError, match="recorded already"):
        record(trainer(tmp_path, [WINDOW])[0], [WINDOW])


def loss_of(outputs, labels, num_items_in_batch=None):
    logits = outputs[0] if isinstance(outputs, tuple) else outputs["logits"]
    return torch.nn.functional.cross_entropy(logits, labels)


@pytest.mark.parametrize("kind", ["dict", "tuple without a loss"])
def test_a_loss_of_ones_own(kind, usual, tmp_path):
    """The trainer then keeps the labels from the network, whose tuple begins with the logits."""
    assert scores_of(*trainer(tmp_path, [WINDOW], kind, compute_loss_func=loss_of)) == usual


@pytest.mark.parametrize("kind", ["plain", "chosen", "transformed"])
def test_any_kind_of_hugging_face_dataset(kind, usual, tmp_path):
    rows = datasets_rows()
    if kind == "chosen":
        rows = rows.select([*range(8)][::-1]).select([*range(8)][::-1])
    if kind == "transformed":
        rows = rows.with_transform(
            lambda batch: {
                "image": [torch.tensor(image) for image in batch["image"]],
                "labels": batch["labels"],
            }
        )
    assert scores_of(*trainer(tmp_path, [WINDOW], rows=rows)) == usual


def test_what_ends_in_mid_epoch_or_early(usual, tmp_path, caplog):
    """Whole epochs count; too few have no score. A checkpoint of a training without scores, or of
    another batch, is no place to go on from, nor one that an earlier training left there."""
    assert len(scores_of(*trainer(tmp_path / "part", [WINDOW], num_train_epochs=3.5))) == 8
    made, recorder = trainer(tmp_path, [WINDOW], save_steps=5, callbacks=[])
    made.train()
    checkpoint = tmp_path / "trainer" / "checkpoint-5"
    saved = sorted(path.name for path in (checkpoint / "tdds").iterdir())
    shutil.rmtree(tmp_path / "scored")
    again, recorder = trainer(tmp_path, [WINDOW], save_steps=5)
    assert scores_of(again, recorder) == usual
    assert sorted(path.name for path in (checkpoint / "tdds").iterdir()) == saved
    with pytest.raises(InputError, match="already holds a trajectory"):
        again.train()
    other, _ = trainer(tmp_path, [WINDOW], per_device_train_batch_size=2)
    with pytest.raises(InputError, match="saved with 4 samples in a forward pass over all ranks"):
        other.train(resume_from_checkpoint=str(checkpoint))
    shutil.rmtree(checkpoint / "tdds")
    with pytest.raises(InputError, match="checkpoint-5 holds no tdds/, the state of the scores"):
        again.train(resume_from_checkpoint=str(checkpoint))


def test_train_again_after_a_failure_starts_over(usual, tmp_path):
    made, recorder = trainer(tmp_path, [WINDOW])
    recorder.out, step, failing = None, made.training_step, [3]

    def fails(*arguments, **more):
        failing[0] -= 1
        if failing[0] == 0:
            raise KeyError("of the user")
        return step(*arguments, **more)

    made.training_step, finish, epochs = fails, recorder.finish, []
    recorder.finish = lambda: (epochs.append(recorder._scorer.epoch), finish())
    with pytest.raises(KeyError):
        made.train()
    made.train()
    assert [len(score_N) for score_N in recorder.scores.values()] == [8]
    assert epochs == [3]


def test_it_goes_on_from_the_last_step_of_an_epoch(usual, tmp_path):
    """The trainer then begins the next epoch; and what an earlier training of another batch left in
    the same folder is not taken for it."""
    other, _ = trainer(tmp_path, [WINDOW], save_steps=2, per_device_train_batch_size=2)
    (tmp_path / "trainer" / "checkpoint-2" / "tdds" / "step_0000000009").mkdir(parents=True)
    other.train()
    shutil.rmtree(tmp_path / "scored")
    trainer(tmp_path, [WINDOW], save_steps=2)[0].train()
    made, recorder = trainer(tmp_path, [WINDOW], save_steps=2)
    checkpoint = tmp_path / "trainer" / "checkpoint-2"
    assert [path.name for path in (checkpoint / "tdds").iterdir()] == ["step_0000000000"]
    made.train(resume_from_checkpoint=str(checkpoint))
    assert [score_N.tolist() for score_N in recorder.scores.values()] == [usual]
