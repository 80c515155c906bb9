"""Scores of a training by timm's loaders and networks are those of a plain loop over what it saw."""

import numpy as np
import pytest
import torch

from tests.loops import plain

pytestmark = pytest.mark.loops
timm = pytest.importorskip("timm")


def run(ranks, folder, *words, code=0, scored=True):
    windows = [("--window", window.T, window.K, window.beta) for window in plain.WINDOWS]
    wrapper = ["-m", "tdds_dist.loops.timm", "--out", folder / "scored", *sum(windows, ())]
    wrapper = wrapper if scored else ()
    return plain.run("program_timm.py", ranks, folder, *words, code=code, wrapper=wrapper)


@pytest.mark.parametrize(
    ("ranks", "kind"), [(1, "prefetcher, bfloat16, last batch"), (2, "workers, compiled")]
)
def test_scores_are_those_of_a_plain_loop_also_over_a_resume(ranks, kind, tmp_path):
    """It stops where its third epoch was scored and its checkpoint was not written yet. Training is
    as without, where timm does not leave out the last batch."""
    said = run(ranks, tmp_path / "whole", kind, 0).stderr
    assert said.count("the last batch") == 1
    plain.check(tmp_path / "whole", ranks)
    run(ranks, tmp_path / "stopped", kind, 2, code=7)
    states = {path.name for path in (tmp_path / "stopped" / "scored" / "state").iterdir()}
    assert states == {"epoch_2", "epoch_3"}
    run(ranks, tmp_path / "stopped", kind, 0, "resume")
    plain.check(tmp_path / "stopped", ranks)
    if "last batch" in kind:
        run(ranks, tmp_path / "unscored", kind, 0, scored=False)
        scored, unscored = (
            np.load(tmp_path / name / "result.npz")["weights"] for name in ("whole", "unscored")
        )
        assert scored.tobytes() == unscored.tobytes()


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Run the text of a script, scored; `dataset` and `model` are there. What timm is given by
    others goes back afterwards."""
    from tdds_dist.loops.timm import main

    changed = [
        (timm, "create_model"),
        (timm.models, "create_model"),
        (timm.models, "resume_checkpoint"),
        (timm.task, "resume_task_checkpoint"),
        (timm.data, "create_loader"),
        (timm.data.Mixup, "__init__"),
        (torch.distributed, "destroy_process_group"),
    ]
    for place, name in changed:
        monkeypatch.setattr(place, name, getattr(place, name))

    def run_script(text, window="3 3 0.9", options=""):
        (tmp_path / "train.py").write_text(f"""
import torch, timm, timm.models
from pathlib import Path
from timm.data import AugMixDataset, Mixup, create_loader
from timm.models import create_model

class Images(torch.utils.data.Dataset):
    transform = None
    def __len__(self): return 6
    def __getitem__(self, at): return torch.full((3, 8, 8), float(at)), at % 2

class Stream(torch.utils.data.IterableDataset):
    def __iter__(self): return iter(())

def Head(**_):
    return torch.nn.Sequential(torch.nn.AvgPool2d(8), torch.nn.Flatten(), torch.nn.Linear(3, 2))

timm.models._registry._model_entrypoints["head_of_a_test"] = Head
Head.__module__ = "timm.models.resnet"

def load(dataset=None, **options):
    options = dict(is_training=True, use_prefetcher=False, num_workers=0) | options
    dataset = Images() if dataset is None else dataset
    loader = create_loader(dataset, (3, 8, 8), 4, **options)
    for dataset in (loader.dataset, getattr(loader.dataset, "dataset", None)):
        if dataset is not None: dataset.transform = None
    return loader

def train(model=None, loader=None, epochs=3):
    model, loader = model or create_model("head_of_a_test"), loader or load()
    for epoch in range(epochs):
        for image, label in loader:
            model.train()
            model(image)
{text}
""")
        arguments = ["--out", tmp_path / "out", "--window", *window.split(), tmp_path / "train.py"]
        main([str(word) for word in [*arguments, *options.split()]])
        return sorted(path.name for path in (tmp_path / "out").rglob("tdds_*.npz"))

    return run_script


def test_a_script_that_leaves_by_exit_is_scored(script):
    assert script("train(); exit()") == ["tdds_official_T3_K3_beta0.9.npz"]


def test_a_script_that_fails_is_not(script, tmp_path):
    with pytest.raises(SystemExit) as leaving:
        script("train(); exit(3)")
    assert leaving.value.code == 3
    assert not (tmp_path / "out" / "scores").exists()


def test_more_passes_over_a_batch_count_once(script):
    text = """
model = create_model("head_of_a_test")
class Twice(torch.nn.Module):
    def forward(self, image):
        model.eval(); model(image); model.train()
        return model(image) + model(image)
train(Twice())"""
    assert len(script(text)) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Mixup(mixup_alpha=1.0)", "leave out --mixup, --cutmix"),
        (
            "load(AugMixDataset(Images(), 2), num_aug_splits=2)",
            "AugMixDataset with BatchSampler and RandomSampler",
        ),
        ("load(Stream())", "a loader of Stream with .* leave out .* streams"),
        ("load(input_size_choices=[8, 16])", "ScheduledBatchSampler"),
        ("", "no training loader by timm.data.create_loader"),
        ("train(Head())", "no network made by timm's create_model saw a batch"),
        (
            "model = create_model('head_of_a_test'); model[2] = torch.nn.Identity();"
            " model[1] = torch.nn.Identity(); train(model)",
            r"the network returned \(4, 3, 1, 1\) for labels \(4,\)",
        ),
        ("train(); train()", "already holds a trajectory"),
        (
            "torch.save(dict(state_dict=Head().state_dict(), epoch=4, version=2), 'x.pth');"
            " model = create_model('head_of_a_test');"
            " timm.models.resume_checkpoint(model, 'x.pth'); train(model)",
            r"goes on after 5 epochs, of which .*state holds no state \(nothing\)",
        ),
    ],
)
def test_refused(script, text, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=words):
        script(text)


@pytest.mark.parametrize(
    ("window", "options", "words"),
    [
        ("3 2 0.9", "", "one loss difference per window"),
        ("3 x 0.9", "", "--window takes two whole numbers"),
        ("3 3 0.9", "--start-epoch 2", "--start-epoch counts epochs that were not scored"),
    ],
)
def test_options_are_refused_before_the_script_runs(script, window, options, words, capsys):
    with pytest.raises(SystemExit) as leaving:
        script("print('it runs')", window, options)
    output = capsys.readouterr()
    assert words in output.err + str(leaving.value.code)
    assert "it runs" not in output.out
