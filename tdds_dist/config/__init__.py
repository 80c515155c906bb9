"""What can be asked for: every key of a run, an experiment and a cluster file, and the vocabulary of scores.

Owns reading YAML strictly, `key=value` overrides, and each key's sentence, default and rule. Loads no torch. May import the
ground only (`errors`, `console`, `text`). Start with `run`; `schema` reads files for all of them.
"""

__all__ = ["experiment", "grid", "run", "schema", "scores"]  # modules that other rooms may import
