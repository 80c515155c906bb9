"""How the log-probabilities of the previous epoch are kept: of all classes, or of the K largest. Loads no torch, so that a
config can be checked without it; `rows` owns the tables themselves."""

from tdds_dist.errors import InputError

DENSE = "dense"  # of all classes
_TOPK = "topk:"


def parse_storage(storage: str, num_classes: int) -> int | None:
    """K of storage "topk:K", None for "dense".

    Raises:
        InputError: neither of the two, or not 1 <= K < C.
    """
    if storage == DENSE:
        return None
    digits = storage.removeprefix(_TOPK)
    if digits == storage or not (digits.isascii() and digits.isdigit() and len(digits) < 10):
        raise InputError(f"storage={storage!r} is unknown; use {DENSE!r}, or '{_TOPK}K' with a number K, e.g. '{_TOPK}64'")
    if not 1 <= int(digits) < num_classes:
        raise InputError(f"storage={storage!r}: K must be at least 1 and less than the {num_classes} classes; change K, or use "
                         f"{DENSE!r}")
    return int(digits)
