"""The one exception type that means "the input is wrong, not the program".

`tdds` prints an `InputError` as one line and exits with code 2; any other exception is a defect
and keeps its traceback. A message says three things: the value, the rule, the way out.
"""


class InputError(ValueError):
    """A value from outside (config, file, command line, logits) that breaks a rule.

    Where ranks work together, every rank must raise it at the same point, before the next
    collective: a raise on one rank is a hang on the others (see `together` in
    `distributed.collectives`). `shared` says that all ranks raise it, so that only rank 0 need
    print it.
    """

    def __init__(self, message: str, *, shared: bool = False):
        super().__init__(message)
        self.shared = shared


class NonFiniteLogitsError(InputError):
    """Recorded logits held NaN or infinity."""


class CoverageError(InputError):
    """An epoch did not record every sample exactly once."""


class LostRankError(RuntimeError):
    """Another rank ended, or did not answer in time; the message names it. Not bad input: the run
    can go on when started again."""
