"""Corruptions of images, and the options of `tdds write` that ask for them."""

import numpy as np
import pytest

from tdds_dist.cli.main import main
from tdds_dist.data.corruptions import KINDS, corrupt
from tdds_dist.data.manifest import read_manifest
from tdds_dist.data.sources import open_source, with_corruption, with_label_noise
from tests.make import refused


def draws(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng([99, seed])


PATTERNS = {  # that some blur, some coarser grid or some colour could leave as they are
    "upper half": lambda row, column: row < row.max() / 2,
    "left half": lambda row, column: column < column.max() / 2,
    "rows": lambda row, column: row % 2,
    "columns": lambda row, column: column % 2,
    "checkerboard": lambda row, column: (row + column) % 2,
    "diagonals": lambda row, column: (row + column) % 3 == 0,
    "other diagonals": lambda row, column: (row - column) % 3 == 0,
    "pixels of 4": lambda row, column: (row // 4 + column // 4) % 2,
    "a dot": lambda row, column: (row == 5) & (column == 2),
}


def pattern(name: str, height: int, width: int, contrast: int) -> np.ndarray:
    """A uint8 [H, W, 3] image of one of PATTERNS."""
    mask_HW = PATTERNS[name](*np.indices((height, width)))
    return np.repeat((100 + contrast * mask_HW).astype(np.uint8)[:, :, None], 3, axis=2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(8, 8), (8, 31), (32, 32), (50, 37)])
def test_every_kind_changes_every_image_and_keeps_its_form(kind, shape):
    for contrast in (8, 100, -100):
        for image in (pattern(name, *shape, contrast) for name in PATTERNS):
            before = image.copy()
            for seed in range(8):
                out = corrupt(image, kind, draws(seed))
                assert (out.shape, out.dtype) == (image.shape, np.uint8)
                assert (out != image).any()
            np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", ["digits", "synthetic:1,1,32", "synthetic:1,1,500"])
def test_the_change_is_one_that_a_person_sees(kind, spec):
    image = open_source(spec).read(0)[:375]
    changed = [
        np.abs(corrupt(image, kind, draws(seed)).astype(int) - image).mean() for seed in range(6)
    ]
    assert min(changed) > 5  # levels of 255, over the whole image


@pytest.mark.parametrize("kind", KINDS)
def test_the_draws_decide_everything(kind):
    image = open_source("synthetic:1,1,40").read(0)
    image.flags.writeable = False  # as Pillow's arrays are
    np.testing.assert_array_equal(corrupt(image, kind, draws(1)), corrupt(image, kind, draws(1)))
    assert (corrupt(image, kind, draws(1)) != corrupt(image, kind, draws(2))).any()


@pytest.mark.parametrize("level", [0, 20, 128, 255])
def test_noise_and_occlusion_show_on_a_plain_image(level):
    image = np.full((30, 20, 3), level, np.uint8)
    for kind in ("gaussian_noise", "occlusion"):
        assert np.abs(corrupt(image, kind, draws()).astype(int) - image).max() >= 64


def test_noise_has_its_strength_and_no_offset():
    grey = np.full((100, 100, 3), 128, np.uint8)
    change = corrupt(grey, "gaussian_noise", draws()).astype(float) - 128
    assert abs(change.mean()) < 1
    assert 38 < change.std() < 42


@pytest.mark.parametrize("shape", [(32, 32), (375, 500), (8, 64)])
def test_an_occlusion_is_one_rectangle_of_one_colour(shape):
    image = open_source("synthetic:1,1,500").read(0)[: shape[0], : shape[1]]
    places = set()
    for seed in range(10):
        out = corrupt(image, "occlusion", draws(seed))
        row, column = np.nonzero((out != image).any(axis=2))
        top, bottom, left, right = row.min(), row.max() + 1, column.min(), column.max() + 1
        assert len(np.unique(out[top:bottom, left:right].reshape(-1, 3), axis=0)) == 1
        for extent, side in ((bottom - top, shape[0]), (right - left, shape[1])):
            # a pixel may have had the colour before
            assert 0.3 * side - 2 <= extent <= 0.6 * side + 1
        places.add((int(top), int(left)))
    assert len(places) > 3


@pytest.mark.parametrize("side", [32, 320])
def test_a_lower_resolution_keeps_large_forms_and_loses_small_ones(side):
    large, small = pattern("left half", side, side, 100), pattern("checkerboard", side, side, 100)
    for seed in range(8):
        out = corrupt(large, "resolution", draws(seed)).astype(int)
        assert np.abs(out[:, [0, -1]] - large[:, [0, -1]]).max() <= 1
        soft = (np.abs(out - large)[0, :, 0] > 2).sum()
        assert 4 <= soft <= 17  # the edge is between one and two large pixels wide
        assert corrupt(small, "resolution", draws(seed)).std() < 0.3 * small.std()


def test_fog_is_light_and_takes_contrast():
    image = pattern("pixels of 4", 64, 64, 100)
    for seed in range(5):
        out = corrupt(image, "fog", draws(seed))
        assert out.mean() > image.mean() + 10
        light, dark = out[image == 200].astype(float), out[image == 100].astype(float)
        assert 20 <= light.mean() - dark.mean() <= 60


@pytest.mark.parametrize("side", [8, 32, 200])
def test_a_motion_blur_draws_a_dot_out_into_a_line(side):
    image = np.zeros((side, side, 3), np.uint8)
    image[side // 2, side // 2] = 255
    angles = []
    for seed in range(20):
        row, column = np.nonzero(corrupt(image, "motion_blur", draws(seed))[:, :, 0])
        spread = np.linalg.svd(np.stack([row - row.mean(), column - column.mean()]))
        length = np.hypot(np.ptp(row), np.ptp(column))
        assert 0.15 * side - 2 <= length <= 0.25 * side + 2
        # half a pixel beside the line, root mean square
        assert spread.S[1] <= 0.5 * np.sqrt(len(row))
        angles.append(np.arctan2(*spread.U[:, 0]) % np.pi)
    assert np.ptp(angles) > 1.5


def test_what_cannot_be_corrupted_is_refused():
    image = np.zeros((20, 20, 3), np.uint8)
    unknown = r"'rain' is unknown; use one of gaussian_noise, occlusion, .*fog, motion_blur"
    refused(unknown, corrupt, image, "rain", draws())
    small = r"7 x 20 pixels is too small .*at least 8, remove it"
    refused(small, corrupt, image[:, :7], "fog", draws())


# --- tdds write ---


BY_KIND = "(3 gaussian_noise, 3 occlusion, 2 resolution, 2 fog, 2 motion_blur)"


@pytest.mark.parametrize(
    ("options", "settings", "note", "warned"),
    [
        ("", {}, "", False),
        (
            "--label-noise 0.1 --corrupt 0.2 --seed 3",
            {"label_noise": 0.1, "corrupt": 0.2, "noise_seed": 3},
            f"noise (seed 3): 6 labels changed, 12 images corrupted {BY_KIND}",
            False,
        ),
        (
            "--split val --corrupt 0.2",
            {"corrupt": 0.2, "noise_seed": 0},
            f"noise (seed 0): 0 labels changed, 12 images corrupted {BY_KIND}",
            True,
        ),
    ],
)
def test_the_command_adds_noise_and_says_how_much(
    tmp_path, capsys, options, settings, note, warned
):
    """Noise on images for evaluation is warned of; without noise nothing is said of it."""
    out = tmp_path / "x.beton"
    words = f"write synthetic:100,4,16 {out} --subset 60 --num-workers 1 {options}".split()
    assert main(words) == 0
    shown = capsys.readouterr()
    said = [line for line in shown.out.splitlines() if line.startswith("noise")]
    assert said == [note] * bool(note)
    assert ("warning: images for evaluation should stay clean" in shown.err) == warned
    assert ("warning" in shown.err) == warned
    manifest, split = read_manifest(out), "val" if "val" in options else "train"
    plain = {"write_mode": "jpg", "quality": 90, "max_resolution": None, "subset": 60}
    assert manifest.settings == plain | settings
    expected = open_source("synthetic:100,4,16", split, subset=60)
    expected = with_label_noise(expected, settings.get("label_noise", 0), 3)
    expected = with_corruption(expected, settings.get("corrupt", 0), settings.get("noise_seed", 0))
    np.testing.assert_array_equal(manifest.label_N, expected.label_N)
    assert manifest.corruption == expected.corruption
    assert (manifest.true_label_N is None) == (expected.true_label_N is None)
