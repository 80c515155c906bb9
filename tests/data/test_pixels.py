"""What becomes of the pixels of each mode and format: every row of the table in docs/images.md."""

import struct
import subprocess
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from benchmarks.memory_limit import limited
from tdds_dist.data import pixels
from tdds_dist.data.pixels import PixelRules, own_files, pixel_rules, read_rgb, summary
from tdds_dist.errors import InputError

ROOT = Path(__file__).parents[2]
WHITE = (255, 255, 255)
RAMP = np.arange(18, dtype=np.uint8).reshape(2, 3, 3) * 14  # 2 x 3 pixels, all different


def encoded(image: Image.Image | np.ndarray, form: str = "png", **options: Any) -> bytes:
    file = BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, form, **options)
    return file.getvalue()


def plain(mode: str, colour: Any, size: tuple[int, int] = (3, 2)) -> Image.Image:
    return Image.new(mode, size, colour)


def png(depth: int, colour_type: int, rows: list[bytes], width: int, trns: bytes = b"") -> bytes:
    """A PNG as the standard says, in depths that Pillow does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(name, content)
        for name, content in (
            *((b"IHDR", header), (b"tRNS", trns), (b"IDAT", data), (b"IEND", b"")),
        )
        if content or name != b"tRNS"
    )


def words(*values: int) -> bytes:
    return struct.pack(f">{len(values)}H", *values)


def palette(colours: list[tuple[int, int, int]], **options: Any) -> bytes:
    """A PNG of 3 x 2 pixels, the first row of index 0 and the second of index 1."""
    image = Image.fromarray(np.repeat([[0], [1]], 3, axis=1).astype(np.uint8)).convert("P")
    image.putpalette([part for colour in colours for part in colour])
    return encoded(image, **options)


def several(form: str, **options: Any) -> bytes:
    return encoded(
        plain("RGB", (250, 10, 20)), form, save_all=True, append_images=[plain("RGB", 0)], **options
    )


def ycck(luma: int, black: int) -> bytes:
    """A JPEG that says YCCK in its Adobe marker: all four channels as they stand in the file."""
    # Pillow writes what it is given the other way round
    stored = plain("CMYK", tuple(255 - part for part in (luma, 128, 128, black)), (8, 8))
    data = bytearray(encoded(stored, "jpeg", quality=100))
    data[data.index(b"Adobe") + 11] = 2
    return bytes(data)


def white_is_zero(dtype: str, value: float) -> bytes:
    data = encoded(np.full((2, 3), value, dtype), "tiff")
    tag = struct.pack("<HHIHH", 262, 3, 1, 1, 0)
    assert data.count(tag) == 1
    return data.replace(tag, struct.pack("<HHIHH", 262, 3, 1, 0, 0))


def two_rows(first: Any, second: Any) -> np.ndarray:
    return np.array([[first] * 3, [second] * 3], np.uint8)


C, D = pixels.COMPOSITED, pixels.DROPPED
RED, BLUE = (255, 0, 0), (0, 0, 255)
# row of the table: files, their pixels, what is counted
PAGE: dict[str, list[tuple[Callable[[], bytes], Any, str]]] = {
    "RGB, 8 bits": [
        (lambda: encoded(RAMP), RAMP, ""),
        (lambda: encoded(RAMP, "bmp"), RAMP, ""),
        (lambda: encoded(RAMP, "webp", lossless=True), RAMP, ""),
    ],
    "grey, 8 bits (`L`)": [(lambda: encoded(plain("L", 100)), (100,) * 3, "")],
    "black and white (`1`)": [(lambda: encoded(plain("1", 1)), WHITE, "")],
    "palette (`P`)": [(lambda: palette([RED, BLUE]), two_rows(RED, BLUE), "")],
    "palette with transparency": [
        (lambda: palette([RED, BLUE], transparency=0), two_rows(WHITE, BLUE), C),
        (
            lambda: palette([RED, BLUE], transparency=bytes([128, 255])),
            two_rows((255, 127, 127), BLUE),
            C,
        ),
        (
            lambda: encoded(Image.open(BytesIO(palette([RED, BLUE]))), "gif", transparency=1),
            two_rows(RED, WHITE),
            C,
        ),
    ],
    "RGB and opacity (`RGBA`)": [
        (
            lambda: encoded(two_rows((10, 20, 30, 0), (13, 20, 30, 51))),
            two_rows(WHITE, (207, 208, 210)),
            C,
        ),
        (lambda: encoded(plain("RGBA", (10, 20, 30, 255))), (10, 20, 30), ""),
    ],
    "grey and opacity (`LA`)": [(lambda: encoded(plain("LA", (50, 51))), (214,) * 3, C)],
    "one transparent colour (PNG, `tRNS`)": [
        (lambda: encoded(two_rows(RED, BLUE), transparency=RED), two_rows(WHITE, BLUE), C),
        *(
            (
                lambda depth=depth, last=last: png(
                    depth, 0, [b"\0" * depth, b"\xff" * depth], 8, words(last)
                ),
                np.array([[[0] * 3] * 8, [WHITE] * 8], np.uint8),
                C,
            )
            for depth, last in ((1, 1), (2, 3), (4, 15), (8, 255))
        ),
        (
            lambda: png(4, 0, [b"\x77", b"\x55"], 2, words(7)),
            np.array([[WHITE] * 2, [(85,) * 3] * 2], np.uint8),
            C,
        ),
        (
            lambda: png(16, 0, [words(0x1234), words(0x8001)], 1, words(0x1234)),
            np.array([[WHITE], [(128,) * 3]], np.uint8),
            C,
        ),
        (
            lambda: png(16, 2, [words(513, 2, 3), words(65535, 0, 0)], 1, words(65535, 0, 0)),
            np.array([[(2, 0, 0)], [WHITE]], np.uint8),
            C,
        ),
    ],
    "transparent everywhere": [(lambda: encoded(plain("RGBA", (10, 20, 30, 0))), (10, 20, 30), D)],
    "RGB, 16 bits a channel": [
        (lambda: png(16, 2, [words(0x12FF, 0x8001, 0xFFFF)], 1), (0x12, 0x80, 255), "")
    ],
    "RGB and opacity, 16 bits a channel": [
        (
            lambda: png(16, 6, [words(0, 0, 0, 0x3333), words(1, 2, 3, 65535)], 1),
            np.array([[(204,) * 3], [(0, 0, 0)]], np.uint8),
            C,
        )
    ],
    "grey, 16 bits (`I;16`)": [
        (
            lambda: encoded(np.array([[0, 255, 0x80FF, 65535]], np.uint16)),
            np.array([[(v,) * 3 for v in (0, 0, 128, 255)]], np.uint8),
            pixels.SCALED,
        ),
        (
            lambda: encoded(np.array([[0, 0x80FF]], ">u2"), "tiff"),
            np.array([[(v,) * 3 for v in (0, 128)]], np.uint8),
            pixels.SCALED,
        ),
    ],
    "grey, 32 bits (`I`)": [
        (
            lambda: encoded(np.array([[0, 255, 0x80FF, 65535]], np.int32), "tiff"),
            np.array([[(v,) * 3 for v in (0, 0, 128, 255)]], np.uint8),
            pixels.SCALED,
        ),
        (
            lambda: b"P5 2 1 65535\n" + words(0, 0x80FF),
            np.array([[(v,) * 3 for v in (0, 128)]], np.uint8),
            pixels.SCALED,
        ),
    ],
    "grey, floats (`F`)": [
        (
            lambda: encoded(np.arange(256, dtype=np.float32)[None] / 255, "tiff"),
            np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2),
            pixels.SCALED,
        )
    ],
    "grey of more than 8 bits, where white is zero (TIFF)": [
        (lambda: white_is_zero("uint16", 0x10FF), (0xEF,) * 3, pixels.SCALED),
        (lambda: white_is_zero("float32", 0.2), (204,) * 3, pixels.SCALED),
    ],
    "`CMYK`": [
        (lambda: encoded(plain("CMYK", (0, 255, 51, 0)), "tiff"), (255, 0, 204), ""),
        (lambda: encoded(plain("CMYK", (0, 0, 0, 51), (8, 8)), "jpeg"), (204,) * 3, ""),
    ],
    "YCCK (JPEG)": [
        (lambda: ycck(200, 255), (55,) * 3, ""),
        (lambda: ycck(0, 100), (100,) * 3, ""),
    ],
    "`YCbCr`": [(lambda: encoded(plain("YCbCr", (76, 85, 255)), "tiff"), (254, 0, 0), "")],
    # red in CIE Lab of D50: 54.29, 80.81, 69.89
    "`LAB`": [
        (lambda: encoded(plain("LAB", (138, 81 + 128, 70 + 128)), "tiff"), RED, ""),
        (lambda: encoded(plain("LAB", (255, 128, 128)), "tiff"), WHITE, ""),
    ],
    "animated GIF": [(lambda: several("gif"), (250, 10, 20), pixels.FIRST_FRAME)],
    "animated PNG, animated WebP": [
        (lambda: several("png"), (250, 10, 20), pixels.FIRST_FRAME),
        (lambda: several("png", default_image=True), (250, 10, 20), pixels.FIRST_FRAME),
        (lambda: several("webp", lossless=True), (250, 10, 20), pixels.FIRST_FRAME),
    ],
    "TIFF of several pages": [(lambda: several("tiff"), (250, 10, 20), pixels.FIRST_FRAME)],
    "MPO (phones and stereo cameras)": [(lambda: several("mpo"), (250, 10, 20), "")],
    "colour profiles (ICC)": [(lambda: encoded(RAMP, icc_profile=b"\0" * 128), RAMP, "")],
}
CASES = [(row, *case) for row, cases in PAGE.items() for case in cases]
# rows of which no file can be made here, or that have a test of their own
OTHERS = {
    "palette and opacity (`PA`)",
    "RGB and opacity, multiplied (`RGBa`)",
    "EXIF orientation 2 to 8",
}


def rows_of_the_page() -> list[str]:
    lines = (ROOT / "docs/images.md").read_text().splitlines()
    return [line.split("|")[1].strip() for line in lines if line.startswith("| ")][1:]


def test_every_row_of_the_page_is_tested():
    rows = rows_of_the_page()
    assert len(rows) == len(set(rows)) > 20
    assert PAGE.keys() | OTHERS == set(rows)


def read(data: bytes, rules: PixelRules | None = None) -> tuple[np.ndarray, dict[str, int]]:
    tally: Counter[str] = Counter()
    rgb = read_rgb(BytesIO(data), rules or PixelRules(), tally)
    assert (rgb.dtype, rgb.ndim, rgb.shape[2]) == (np.uint8, 3, 3)
    assert rgb.flags.c_contiguous
    return rgb, dict(tally)


@pytest.mark.parametrize(("row", "file", "expected", "counted"), CASES)
def test_pixels_are_those_of_the_page(row, file, expected, counted):
    data = file()
    rgb, tally = read(data)
    lossy = 6 if "LAB" in row else 3 if data[:2] == b"\xff\xd8" else 0
    assert np.abs(rgb.astype(int) - np.asarray(expected)).max() <= lossy
    assert isinstance(expected, tuple) or rgb.shape == expected.shape
    if pixels.SCALED in tally and counted == C:
        assert tally.pop(pixels.SCALED) == 1  # a grey of 16 bits, with a transparent one
    assert tally == ({counted: 1} if counted else {})


@pytest.mark.parametrize("mode", ["PA", "RGBa", "La"])
def test_modes_that_few_files_have_are_laid_on_the_background_too(mode):
    """Pillow makes them of rare formats only, so the loaded image is given."""
    image = plain("LA" if mode == "La" else "RGBA", (50, 51) if mode == "La" else (50, 50, 50, 51))
    image = image.convert("PA" if mode == "PA" else mode)
    tally: Counter[str] = Counter()
    rgb = pixels._rgb(image, None, PixelRules(), tally)
    assert np.abs(rgb.astype(int) - 214).max() <= 3
    assert tally == {C: 1}


@pytest.mark.parametrize(
    ("background", "expected"),
    [("black", (2, 4, 6)), ("#ff0000", (206, 4, 6)), ("none", (10, 20, 30))],
)
def test_the_background_is_the_one_that_was_asked_for(background, expected):
    data = encoded(plain("RGBA", (10, 20, 30, 51)))
    rgb, tally = read(data, pixel_rules(background=background))
    assert tuple(rgb[0, 0]) == expected
    assert tally == {D if background == "none" else C: 1}


# --- turned photos ---


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("form", ["png", "webp", "tiff", "jpeg"])
def test_photos_stand_upright_unless_asked_not_to(form, orientation):
    """The reference is Pillow's own; orientations that EXIF does not know turn nothing."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    large = np.kron(RAMP, np.ones((16, 16, 1), np.uint8))
    options = {"lossless": True} if form == "webp" else {"quality": 95} if form == "jpeg" else {}
    data = encoded(large, form, exif=exif, **options)
    upright = ImageOps.exif_transpose(Image.open(BytesIO(data)))
    turned = 2 <= orientation <= 8
    rgb, tally = read(data)
    np.testing.assert_array_equal(rgb, np.asarray(upright))
    assert tally == ({pixels.TURNED: 1} if turned else {})
    stored, tally = read(data, pixel_rules(exif="ignore"))
    np.testing.assert_array_equal(stored, np.asarray(Image.open(BytesIO(data)).convert("RGB")))
    if form == "tiff":  # Pillow turns it itself, whoever reads
        assert tally == ({pixels.TURNED: 1} if turned else {})
    else:
        assert tally == ({pixels.NOT_TURNED: 1} if turned else {})
        assert stored.shape == large.shape


def test_damaged_exif_does_not_cost_the_image():
    data = encoded(np.zeros((8, 8, 3), np.uint8), "jpeg", exif=b"Exif\0\0MM\0*\0\0\xff\xff garbage")
    rgb, tally = read(data)
    assert (rgb.shape, tally) == ((8, 8, 3), {})


# --- deep greys ---


def tiff(*values: float, dtype: str) -> bytes:
    return encoded(np.array([values], dtype), "tiff")


@pytest.mark.parametrize(
    ("data", "grey_range", "expected"),
    [
        (tiff(0, 100, 4095, dtype="uint16"), "0,4095", [0, 6, 255]),
        (tiff(0, 100, 255, dtype="uint16"), "0,255", [0, 100, 255]),
        (tiff(0, 100, 255, dtype="int32"), "0,255", [0, 100, 255]),
        (tiff(-1024, 0, 3071, dtype="int32"), "-1024,3071", [0, 64, 255]),
        (tiff(0, 200, dtype="uint16"), "0,65535", [0, 0]),
        (tiff(0, 51, 255, dtype="float32"), "0,255", [0, 51, 255]),
        (tiff(-1, 0, 1, dtype="float32"), "-1,1", [0, 128, 255]),
    ],
)
def test_a_range_scales_all_deep_greys(data, grey_range, expected):
    rgb, tally = read(data, pixel_rules(grey_range=grey_range))
    assert rgb[0, :, 1].tolist() == expected
    assert tally == {pixels.SCALED: 1}


@pytest.mark.parametrize(
    ("data", "match", "way_out"),
    [
        (tiff(0, 65536, dtype="int32"), "from 0 to 65536, outside", "0,65536"),
        (tiff(-5, 7, dtype="int32"), "from -5 to 7, outside", "-5,65535"),
        (tiff(0, 255, dtype="float32"), "floats from 0 to 255, outside the range 0 to 1", "0,255"),
        (tiff(-0.5, 1, dtype="float32"), "floats from -0.5 to 1", "-0.5,1"),
        (tiff(3, 255, dtype="uint16"), "would become one flat grey", "0,255"),
        (tiff(3, 255, dtype="uint16"), "take them as they are", "0,65535"),
        (tiff(256, 300, dtype="int32"), "would become one flat grey", "0,300"),
        (tiff(0, 0.001, dtype="float32"), "would become one flat grey", "0,1"),
    ],
)
def test_greys_that_the_range_does_not_fit_are_refused_with_one_that_does(data, match, way_out):
    with pytest.raises(ValueError, match=match) as error:
        read(data)
    assert f"--grey-range={way_out}" in str(error.value)
    read(data, pixel_rules(grey_range=way_out))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_no_numbers_are_refused(value):
    with pytest.raises(ValueError, match="no finite numbers; replace them"):
        read(tiff(0, value, dtype="float32"))


def test_greys_of_12_bits_are_counted_and_flat_ones_are_no_fault():
    assert read(tiff(0, 4095, dtype="uint16"))[1] == {pixels.SCALED: 1, pixels.DARK: 1}
    assert read(tiff(0, 4096, dtype="uint16"))[1] == {pixels.SCALED: 1}
    assert read(tiff(7, 7, dtype="uint16"))[0].max() == 0


# --- sizes, options, words ---


def test_pillows_limit_is_lifted_and_memory_is_looked_at_instead(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    data = encoded(np.zeros((20, 30, 3), np.uint8))
    assert read(data)[0].shape == (20, 30, 3)
    assert Image.MAX_IMAGE_PIXELS == 100
    # 32 TB: refused by its header, before a byte of its pixels is looked for
    with pytest.raises(ValueError, match=r"1,600,000 million pixels take .* are free; shrink it"):
        read(b"P5 4000000 400000 255\n")


def test_the_limit_is_back_after_several_threads(monkeypatch):
    """Each begins before the one before it ends."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    filters = [*warnings.filters]
    with ExitStack() as second:
        with own_files:
            second.enter_context(own_files)
        assert Image.MAX_IMAGE_PIXELS is None
    assert (Image.MAX_IMAGE_PIXELS, [*warnings.filters]) == (100, filters)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"background": "transparent-ish"}, "use white, black, #rrggbb, or none"),
        ({"background": "#ff00ff80"}, "use white, black, #rrggbb, or none"),
        *(
            ({"grey_range": text}, r"must be two numbers, the lower first; use 0,4095")
            for text in ("", "1", "1,1", "5,2", "0,nan", "0,inf", "a,b", "0,1,2")
        ),
    ],
)
def test_options_that_are_none_are_refused(options, match):
    with pytest.raises(InputError, match=match):
        pixel_rules(**options)


def test_the_summary_counts_by_kind():
    tally = Counter({C: 1200, pixels.TURNED: 3, pixels.SCALED: 1})
    assert summary(tally, pixel_rules(background="black").settings) == [
        "pixels: 3 turned upright (EXIF); 1,200 with transparency laid on the background #000000;"
        " 1 greys of more than 8 bits scaled (0..65535, floats 0..1 to 0..255)"
    ]
    assert "(0..4095 to 0..255)" in summary(tally, pixel_rules(grey_range="0,4095").settings)[0]
    assert summary(Counter(), PixelRules().settings) == []


def test_free_memory_is_what_a_job_was_given():
    """In a group inside one with a limit, as a cluster makes them for a job and its steps."""
    program = (
        "import os, sys; from pathlib import Path; from tdds_dist.data.pixels import available_bytes\n"
        "Path(sys.argv[1], 'cgroup.procs').write_text(str(os.getpid())); held = b'x' * 300_000_000\n"
        "print(available_bytes())"
    )
    with ExitStack() as stack:
        try:
            group = stack.enter_context(limited(10**9))
            (step := group / "step").mkdir()
        except (InputError, OSError) as error:
            pytest.skip(str(error))
        stack.callback(step.rmdir)
        command = [sys.executable, "-c", program, str(step)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert 5e8 < int(said) < 7.1e8
