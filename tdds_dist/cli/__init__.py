"""The command line: which commands there are (`parser`); the options of each, and what it does with
them (`dataset`, `planning`, `training`, `scores`, `results`); what they share (`options`); what a
command says at its end (`outcome`), what it needs around it (`surroundings`), and exit codes
(`main`). May import every room of the package, but the stages only when they run: `tdds --help` and
a wrong path should not wait for torch. Does not know `launch`, whose commands are handed in.
"""

__all__ = ["main", "options", "outcome", "scores"]  # that other rooms may import
