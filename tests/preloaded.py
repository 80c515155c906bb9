"""What every rank of a test would load anew, or look at: numba's tables of what it can compile, and
what the server has loaded, which is no garbage."""

import gc

from numba.core.registry import cpu_target

cpu_target.typing_context.refresh()
cpu_target.target_context.refresh()
gc.freeze()
