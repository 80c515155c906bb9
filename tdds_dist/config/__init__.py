"""Settings: every key of a run and of an experiment, and the vocabulary of scores.

Owns reading YAML strictly, `key=value` overrides, and each key's sentence, default and rule. Loads
no torch. May import the ground only (`errors`, `console`, `text`). Start with `run`; `schema` reads
the files of all, a cluster file's (`tdds_dist.launch.cluster`) too.
"""

# modules that other rooms may import
__all__ = ["experiment", "grid", "prune", "run", "schema", "scores"]
