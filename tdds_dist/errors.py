"""The one exception type that means "the input is wrong, not the program".

`tdds` prints an `InputError` as one line and exits with code 2; any other exception is a defect
and keeps its traceback. A message says three things: the value, the rule, the way out.
"""


class InputError(ValueError):
    """A value from outside (config, file, command line, logits) that breaks a rule.

    Every rank must raise it at the same point of the program, before the next collective:
    a raise on one rank is a hang on the others (see `distributed.agree`).
    """


class NonFiniteLogitsError(InputError):
    """Recorded logits held NaN or infinity."""


class CoverageError(InputError):
    """An epoch did not record every sample exactly once."""
