"""Import FFCV in half the time. Whoever imports FFCV imports this first.

FFCV keeps the numbers of its two image modes in a dictionary of numba, for which numba compiles for
4 seconds in every process. Only Python code reads them, so that a plain one does.
"""

import numba.typed

_compiled = numba.typed.Dict
numba.typed.Dict = dict
try:
    import ffcv.fields.rgb_image  # noqa: F401
finally:
    numba.typed.Dict = _compiled
