"""Scores of a training by timm's loaders and networks are those of a plain loop over what it saw."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch.distributed as dist

from tdds_dist.scoring.trajectory import Trajectory
from tests.loops import plain

pytestmark = pytest.mark.loops
timm = pytest.importorskip("timm")


def run(ranks, folder, *words, code=0, scored=True):
    windows = [("--window", window.T, window.K, window.beta) for window in plain.WINDOWS]
    wrapper = ["-m", "tdds_dist.loops.timm", "--out", folder / "scored", *sum(windows, ())]
    wrapper = wrapper if scored else ()
    return plain.run("program_timm.py", ranks, folder, *words, code=code, wrapper=wrapper)


@pytest.mark.parametrize(("ranks", "kind"), [(1, "prefetcher, bfloat16"), (2, "workers, compiled")])
def test_scores_are_those_of_a_plain_loop_also_over_a_resume(ranks, kind, tmp_path):
    """It stops where its third epoch was scored and its checkpoint was not written yet. Training is
    as without, in one go, where timm does not leave out the last batch."""
    run(ranks, tmp_path / "scored", kind, 2, code=7)
    states = {path.name for path in (tmp_path / "scored" / "scored" / "state").iterdir()}
    assert states == {"epoch_2", "epoch_3"}
    run(ranks, tmp_path / "scored", kind, 0, "resume")
    plain.check(tmp_path / "scored", ranks, given=False)
    run(ranks, tmp_path / "unscored", kind, 0, scored=False)
    scored, unscored = (
        np.load(tmp_path / name / "result.npz")["weights"] for name in ("scored", "unscored")
    )
    assert scored.tobytes() == unscored.tobytes()


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Run the text of a script, scored, in which MODEL, LOADER, IMAGES, CHECKPOINT and train are
    known. What it changes in timm is as before afterwards."""
    from tdds_dist.loops.timm import main

    changed = [
        *[(place, "create_model") for place in (timm, timm.models)],
        *[(place, "create_loader") for place in (timm.data, timm.data.loader)],
        *[(place, "destroy_process_group") for place in (dist, dist.distributed_c10d)],
        *[(timm.models, "resume_checkpoint"), (timm.task, "resume_task_checkpoint")],
        *[(timm.data, "create_naflex_loader"), (timm.data.dataset, "_ERROR_RETRY")],
        *[(timm.data.Mixup, "__init__"), (timm.utils.CheckpointSaver, "save_checkpoint")],
    ]
    monkeypatch.chdir(tmp_path)

    def run_script(text, window="3 3 0.9", out="out"):
        (tmp_path / "train.py").write_text(f"""
import copy, torch, timm, timm.models, timm.utils
from torch import distributed as dist
from pathlib import Path
from PIL import Image
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

MODEL, LOADER, IMAGES = create_model("head_of_a_test"), None, torch.zeros(4, 3, 8, 8)
if "LOADER" in {text!r}:
    LOADER = load()
if "SAVER" in {text!r}:
    SAVER = timm.utils.CheckpointSaver(MODEL, torch.optim.SGD(MODEL.parameters()), checkpoint_dir=".")
def CHECKPOINT(epoch, path="x.pth.tar"):
    torch.save(dict(state_dict=MODEL.state_dict(), epoch=epoch, version=2), path)
    timm.models.resume_checkpoint(MODEL, path)

def train(model=None, loader=None, epochs=3):
    model, loader = model or MODEL, loader or LOADER or load()
    for epoch in range(epochs):
        for image, label in loader:
            model.train()
            model(image)
{text}
""")
        with monkeypatch.context() as patch:
            for place, name in changed:
                patch.setattr(place, name, getattr(place, name))
            main(["--out", out, "--window", *window.split(), "train.py"])
        return sorted(path.name for path in (tmp_path / out).rglob("tdds_*.npz"))

    return run_script


SCORED = """
train(); exit()

train(epochs=0)
for epoch in range(3):  # the last batch is not waited for
    for step, (image, label) in zip(range(2), LOADER): MODEL(image)

torch.save(MODEL, "whole.pt"); copy.deepcopy(MODEL)(IMAGES)
train(MODEL)

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
train(); dist.destroy_process_group()

images = Images()  # is_training given by its place
loader = create_loader(images, (3, 8, 8), 4, True, use_prefetcher=False, num_workers=0)
images.transform = None
train(loader=loader)

train(); train(MODEL, LOADER, epochs=1)
""".strip().split("\n\n")


@pytest.mark.parametrize("text", SCORED)
def test_a_script_that_is_scored(script, text):
    assert script(text) == ["tdds_official_T3_K3_beta0.9.npz"]


def test_of_several_passes_the_first_that_trains_counts(script, tmp_path):
    script("""
class Passes(torch.nn.Module):
    def forward(self, image):
        MODEL.eval(); MODEL(0 * image); MODEL.train()
        with torch.no_grad(): MODEL(0 * image)
        return MODEL(image) + MODEL(0 * image)
train(Passes())""")
    p_label_N = Trajectory(tmp_path / "out" / "trajectory").read("p_label")[0]
    assert len(np.unique(p_label_N)) == 6, "of images that are all alike there are two values"


def test_what_ends_early_gives_no_scores(script, tmp_path, caplog):
    for code, text in [(3, "train(); exit(3)"), (None, "train(epochs=2)")]:
        with pytest.raises(SystemExit) if code else nullcontext() as leaving:
            script(text, out=f"out{code}")
        assert leaving is None or leaving.value.code == code
        assert not (tmp_path / f"out{code}" / "scores").exists()
    assert "training ended after 2 whole epochs" in caplog.text


def test_an_error_of_the_script_is_the_one_that_is_seen(script):
    with pytest.raises(KeyError, match="mine"):
        script("""
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
try: raise KeyError("mine")  # before anything can be scored
finally: dist.destroy_process_group()""")


def test_nothing_left_to_train(script, tmp_path, caplog):
    script("train()")
    script("CHECKPOINT(2); train(epochs=0)")
    assert "no epoch was left to train; `tdds score" in caplog.text


def test_an_image_that_cannot_be_read_is_not_replaced(script):
    with pytest.raises(RuntimeError, match="Failed to load"):
        script("""
for number in range(6):
    path = Path("images/train", "ab"[number % 2], f"{number}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)
path.write_bytes(b"no image")
train(loader=create_loader(timm.data.create_dataset("", "images", split="train"), (3, 8, 8), 3,
                           is_training=True, use_prefetcher=False, num_workers=0, no_aug=True))""")


REFUSED = {
    "Mixup(mixup_alpha=1.0)": "leave out --mixup, --cutmix",
    "timm.data.create_naflex_loader(Images())": "loaders of NaFlex are not followed",
    "load(AugMixDataset(Images(), 2), num_aug_splits=2)": "AugMixDataset with BatchSampler",
    "load(Stream())": "a loader of Stream with .* leave out .* streams",
    "load(input_size_choices=[8, 16])": "with ScheduledBatchSampler",
    "train(loader=[(IMAGES, None)])": "made no training loader by timm.data.create_loader",
    "pass": "made no training loader by timm.data.create_loader",
    "load(); load()": "makes a second training loader",
    "train(Head())": "a batch was asked for before the one before it went through a network",
    "next(iter(LOADER)); train()": "a batch was asked for before the one before it",
    "train(); other = create_model('head_of_a_test'); train(other, LOADER)": "two networks of timm",
    "for epoch in range(2):\n    for image, label in LOADER: MODEL(image); break": (
        "an epoch ended after 1 of 2 batches"
    ),
    "MODEL[2] = MODEL[1] = torch.nn.Identity(); train(MODEL)": (
        r"the network returned \(4, 3, 1, 1\) for labels \(4,\)"
    ),
    "MODEL.num_classes = 0; train(MODEL)": r"returned \(4, 2\), and its num_classes=0; let create",
    "CHECKPOINT(4); train(MODEL)": r"on after 5 epochs, of which .*state holds no state \(nothing\)",
    "CHECKPOINT(0, 'recovery-0-1.pth.tar')": "was saved within an epoch",
    "train(epochs=2); SAVER.save_checkpoint(0)": "as of epoch 0, counted from 0, and 2 epochs are",
}


@pytest.mark.parametrize("text", REFUSED)
def test_refused(script, text):
    with pytest.raises(SystemExit, match=REFUSED[text]):
        script(text)


def test_options_are_refused_before_the_script_runs(script, tmp_path, capsys):
    (tmp_path / "timm").mkdir()
    for window, words in [
        ("3 3 0.9", f"a timm of its own beside it; start in {tmp_path}"),
        ("3 x 0.9", "--window takes two whole numbers"),
        ("3 2 0.9", "one loss difference per window"),
    ]:
        with pytest.raises(SystemExit) as leaving:
            script("print('it runs')", window)
        output = capsys.readouterr()
        assert words in output.err + str(leaving.value.code)
        assert "it runs" not in output.out
        (tmp_path / "timm").rmdir() if (tmp_path / "timm").exists() else None
