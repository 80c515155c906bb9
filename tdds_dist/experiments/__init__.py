"""Many runs: the grid of methods x rates x strategies x seeds, what it will take, running it, and
its tables.

May import everything but `cli` and `launch`. Start with `grid`: it lists the runs; `execute` runs
them here, `launch` on a cluster.
"""

# that other rooms may import
__all__ = [
    "doctor",
    "execute",
    "findings",
    "forecast",
    "grid",
    "memory",
    "needs",
    "processes",
    "rehearsal",
    "tables",
]
