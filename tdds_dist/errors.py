"""The one exception type that means "the input is wrong, not the program".

`tdds` prints an `InputError` as one line and exits with code 2; any other exception is a defect
and keeps its traceback. A message says three things: the value, the rule, the way out.
"""

import re

_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class InputError(ValueError):
    """A value from outside (config, file, command line, logits) that breaks a rule.

    Where ranks work together, every rank must raise it at the same point, before the next
    collective: a raise on one rank is a hang on the others (see `together` in
    `distributed.collectives`). `shared` says that all ranks raise it, so that only rank 0 need
    print it.
    """

    def __init__(self, message: str, *, shared: bool = False):
        # names of files may hold line feeds; the message is one line
        super().__init__(_CONTROLS.sub(lambda found: repr(found[0])[1:-1], message))
        self.shared = shared


class NonFiniteLogitsError(InputError):
    """Recorded logits held NaN or infinity."""


class CoverageError(InputError):
    """An epoch did not record every sample exactly once."""


class LostRankError(RuntimeError):
    """Another rank ended, or did not answer in time; the message names it. Not bad input: the run
    can go on when started again."""
