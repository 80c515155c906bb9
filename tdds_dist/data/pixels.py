"""Image files -> RGB of 8 bits: what becomes of each mode and format, by the table of
docs/images.md.

Owns the rules (turned upright, laid on a background, deep greys scaled or refused) and the count of
the images that they changed, so that nothing happens to pixels without a word. Colour profiles are
not applied. Knows no folders and no `.beton` files.
"""

# H height, W width

import os
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageColor

from tdds_dist.errors import InputError
from tdds_dist.text import size_text

# of an image while it is read: Pillow's own copies, one of them of 4 bytes a pixel, and ours
BYTES_PER_PIXEL = 14
LARGE_PIXELS = 50_000_000  # of an image for which memory is looked at first
# the range of greys of more than 8 bits, where none is given: of integers, of floats
INTEGER_RANGE, FLOAT_RANGE = (0.0, 65535.0), (0.0, 1.0)
_ORIENTATION = 0x0112  # tag of EXIF
_WHITE_IS_ZERO = 262, 0  # tag and value of TIFF

# what is counted, in the words of the summary
TURNED = "turned upright (EXIF)"
NOT_TURNED = "left as stored although EXIF turns them"
COMPOSITED = "with transparency laid on the background"
DROPPED = "whose transparency was dropped"
SCALED = "greys of more than 8 bits scaled"
DARK = (
    "of these greys within a sixteenth of the range, so they are nearly flat: give --grey-range"
    " unless they are meant so"
)
FIRST_FRAME = "of several frames or pages, the first taken"
COUNTED = (TURNED, NOT_TURNED, COMPOSITED, DROPPED, SCALED, DARK, FIRST_FRAME)


@dataclass(frozen=True)
class PixelRules:
    """Rules for images. exif: "turn" them upright as EXIF says, or "ignore" it. background:
    the colour under transparent pixels; None drops transparency, and what is stored under it shows.
    grey_range: the values of greys of more than 8 bits that become 0 and 255."""

    exif: str = "turn"
    background: tuple[int, int, int] | None = (255, 255, 255)
    grey_range: tuple[float, float] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Return them as they stand in a manifest."""
        colour = self.background
        return {
            "exif": self.exif,
            "background": "none" if colour is None else "#{:02x}{:02x}{:02x}".format(*colour),
            "grey_range": None if self.grey_range is None else list(self.grey_range),
        }


def pixel_rules(
    exif: str = "turn", background: str = "white", grey_range: str | None = None
) -> PixelRules:
    """Return the rules of these options. Raises InputError for a colour or a range that is none."""
    colour: tuple[int, int, int] | None = None
    if background != "none":
        try:
            found = ImageColor.getrgb(background)
        except ValueError:
            found = (0, 0, 0, 0)
        if len(found) != 3:  # four: with an opacity
            raise InputError(
                f"background={background!r} is no colour; use white, black, #rrggbb, or none to"
                " drop transparency"
            )
        colour = found
    if grey_range is None:
        return PixelRules(exif, colour)
    try:
        low, high = (float(part) for part in grey_range.split(","))
    except ValueError:
        low, high = 0.0, 0.0
    if not (low < high and np.isfinite([low, high]).all()):
        raise InputError(
            f"grey_range={grey_range!r} must be two numbers, the lower first; use 0,4095 for greys"
            " of 12 bits, or --grey-range=-1024,3071 where the first is negative"
        )
    return PixelRules(exif, colour, (low, high))


def summary(tally: Counter[str], rules: dict[str, Any]) -> list[str]:
    """Say in one line how many images were changed, and how; nothing where none was. `rules`: the
    settings of a manifest."""
    given = rules.get("grey_range")
    scale = "{:g}..{:g}".format(*given) if given else "0..65535, floats 0..1"
    more = {COMPOSITED: f" {rules.get('background')}", SCALED: f" ({scale} to 0..255)"}
    said = [f"{tally[what]:,} {what}{more.get(what, '')}" for what in COUNTED if tally[what]]
    return ["pixels: " + "; ".join(said)] if said else []


def read_rgb(file: Path | IO[bytes], rules: PixelRules, tally: Counter[str]) -> np.ndarray:
    """Read an image, uint8 [H, W, 3], RGB; count in `tally` what was done to it.

    Of several frames or pages the first is read. Raises ValueError for pixels that the rules do not
    cover, or for which memory is short, and whatever Pillow raises for a damaged file.
    """
    with own_files, Image.open(file) as image:
        _check_memory(image.width * image.height)
        # before it is loaded, which forgets how it is stored and turns a TIFF
        transparent = _transparent_colour(image)
        orientation = _orientation(image)
        image.load()
        rgb = _rgb(image, transparent, rules, tally)
        if orientation != 1 and image.format != "TIFF" and rules.exif == "ignore":
            tally[NOT_TURNED] += 1
        elif orientation != 1:
            tally[TURNED] += 1
            if image.format != "TIFF":
                rgb = _turned(rgb, orientation)
        # an MPO holds a photo and its previews
        if image.format != "MPO" and _has_more_frames(image):
            tally[FIRST_FRAME] += 1
        return np.ascontiguousarray(rgb)


class _OwnFiles:
    """Pillow's limit of pixels, which is for files of strangers, lifted, and its remarks quiet.
    Both are the whole process's: from the first of several threads that enter to the last one."""

    def __init__(self) -> None:
        self._lock, self._depth = threading.Lock(), 0
        self._restores = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            self._depth += 1
            if self._depth == 1:
                self._restores.callback(setattr, Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
                Image.MAX_IMAGE_PIXELS = None
                self._restores.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth == 0:
                self._restores.close()


own_files = _OwnFiles()


def _check_memory(num_pixels: int) -> None:
    if num_pixels <= LARGE_PIXELS:
        return
    needed, available = num_pixels * BYTES_PER_PIXEL, available_bytes()
    if needed > available:
        raise ValueError(
            f"{num_pixels / 1e6:,.0f} million pixels take {size_text(needed)} of memory while they"
            f" are read, and {size_text(available)} are free; shrink it with another program, or"
            " write on a machine with more memory"
        )


def available_bytes() -> int:
    """Return the memory that this process may still take, in bytes: that of the machine, or what is
    left of the limit of a container or a job, where caches of files count as free."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, StopIteration, ValueError), open("/proc/meminfo") as file:
        free = 1024 * next(int(line.split()[1]) for line in file if line[:13] == "MemAvailable:")
    return max(0, min([free, *_left_in_groups()]))


def _left_in_groups() -> Iterator[int]:
    """Yield what is left of the limit of each control group that this process is in, the groups
    around it included."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kinds, place = line.split(":", 2)
            if kinds not in ("", "memory"):
                continue
            limit, used, root = (
                ("memory.limit_in_bytes", "memory.usage_in_bytes", Path("/sys/fs/cgroup/memory"))
                if kinds
                else ("memory.max", "memory.current", Path("/sys/fs/cgroup"))
            )
            group = root / place.lstrip("/")
            for folder in (group, *group.parents[: len(group.relative_to(root).parts)]):
                # no such group here, or one without a limit
                with suppress(OSError, ValueError, KeyError):
                    most, now = (int((folder / name).read_text()) for name in (limit, used))
                    words = (folder / "memory.stat").read_text().split()
                    stat = dict(zip(words[::2], map(int, words[1::2]), strict=True))
                    whole = "total_" if kinds else ""  # the groups in it too
                    cached = stat[f"{whole}active_file"] + stat[f"{whole}inactive_file"]
                    yield most - now + cached


# --- turning ---


def _orientation(image: Image.Image) -> int:
    """Return the orientation of EXIF, 1 to 8; 1 where it states none, or nothing that is one."""
    try:
        orientation = int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF is no damaged image
        return 1
    return orientation if 1 <= orientation <= 8 else 1


def _turned(rgb: np.ndarray, orientation: int) -> np.ndarray:
    """Turn and mirror stored pixels [H, W, 3] as an orientation of 1 to 8 says."""
    if orientation >= 5:
        rgb = rgb.swapaxes(0, 1)
    upside_down = orientation in (3, 4, 7, 8)
    mirrored = orientation in (2, 3, 6, 7)
    return rgb[:: -1 if upside_down else 1, :: -1 if mirrored else 1]


def _has_more_frames(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # a later frame is damaged, which is not read
        return True


# --- colours ---


def _rgb(
    image: Image.Image, transparent: Any, rules: PixelRules, tally: Counter[str]
) -> np.ndarray:
    """Return the pixels of a loaded image as they are stored, uint8 [H, W, 3]."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        grey = _scaled_grey(image, rules, tally)
        rgb = np.broadcast_to(grey[:, :, None], (*grey.shape, 3))
        if transparent is None:
            return rgb
        alpha = np.where(np.asarray(image) == transparent, 0, 255).astype(np.uint8)
        return _on_background(rgb, alpha, rules, tally)
    if image.mode == "LAB":
        return np.asarray(_from_lab(image))
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data or image.mode == "PA":
        if transparent is not None:
            image.info["transparency"] = transparent
        rgba = np.asarray(image.convert("RGBA"))
        return _on_background(rgba[:, :, :3], rgba[:, :, 3], rules, tally)
    return np.asarray(image.convert("RGB"))


def _transparent_colour(image: Image.Image) -> Any:
    """Return the one colour of a PNG that is transparent, in 8 bits where Pillow has 8 (it leaves
    those of 2, 4 and 16 bits as they stand in the file); None without, or with a palette."""
    colour = image.info.get("transparency")
    if image.format != "PNG" or image.mode not in ("L", "RGB", "I;16"):
        return None
    tile = getattr(image, "tile", None)
    rawmode = str(tile[0][3]) if tile else ""
    if colour is None or image.mode == "I;16":
        return colour
    if image.mode == "RGB":
        return tuple(part >> 8 for part in colour) if ";16" in rawmode else colour
    return colour * {"L;2": 85, "L;4": 17}.get(rawmode, 1)


def _on_background(
    rgb: np.ndarray, alpha: np.ndarray, rules: PixelRules, tally: Counter[str]
) -> np.ndarray:
    """Lay uint8 [H, W, 3] with the opacity [H, W] on the background; an image that is transparent
    everywhere stays as it is."""
    if alpha.min() == 255:
        return rgb
    # transparent everywhere: some programs write an opacity of nothing and mean no transparency
    if rules.background is None or alpha.max() == 0:
        tally[DROPPED] += 1
        return rgb
    tally[COMPOSITED] += 1
    opaque = alpha[:, :, None].astype(np.uint16)
    under = np.array(rules.background, np.uint16) * (255 - opaque)
    return ((rgb * opaque + under + 127) // 255).astype(np.uint8)


def _from_lab(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    found = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    assert found is not None
    return found


def _scaled_grey(image: Image.Image, rules: PixelRules, tally: Counter[str]) -> np.ndarray:
    """Scale greys of 16 or 32 bits to 0..255, uint8 [H, W]: integers by equal steps, floats by
    rounding.

    Nothing is guessed from the values of one image, since the next would be scaled otherwise.
    Raises ValueError for values outside the range, and for an image that it would make flat.
    """
    value = np.asarray(image)
    is_float = value.dtype.kind == "f"
    low, high = rules.grey_range or (FLOAT_RANGE if is_float else INTEGER_RANGE)
    kind = "floats" if is_float else "integers of more than 8 bits"
    lowest, highest = value.min(), value.max()
    if not np.isfinite([lowest, highest]).all():
        raise ValueError("it holds floats that are no finite numbers; replace them")
    if lowest < low or highest > high:
        raise ValueError(
            f"grey {kind} from {lowest:g} to {highest:g}, outside the range {low:g} to {high:g};"
            f" give the range of all images, such as --grey-range={min(low, lowest):g},"
            f"{max(high, highest):g}"
        )
    if getattr(image, "tag_v2", {}).get(_WHITE_IS_ZERO[0]) == _WHITE_IS_ZERO[1]:
        value = (high + low) - value
    if is_float or not (low.is_integer() and high.is_integer()):
        grey = np.rint((value.astype(np.float64) - low) * (255 / (high - low))).astype(np.uint8)
    else:
        shifted = (value.astype(np.int64) - int(low)) * 256
        grey = (shifted // (int(high) - int(low) + 1)).astype(np.uint8)
    tally[SCALED] += 1
    if rules.grey_range is None:
        if lowest != highest and grey.min() == grey.max():
            raise ValueError(
                f"grey {kind} from {lowest:g} to {highest:g} would become one flat grey, since"
                f" {low:g} to {high:g} are scaled to 0..255; give the range of all images, such as"
                f" --grey-range={min(0, lowest):g},{255 if highest <= 255 else highest:g}, or"
                f" --grey-range={low:g},{high:g} to take them as they are"
            )
        if lowest != highest and highest < low + (high - low) / 16:
            tally[DARK] += 1
    return grey
