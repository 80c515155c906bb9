"""Run directories to one HTML page, and the accuracy table of the terminal.

Owns reading finished and unfinished runs, averaging over seeds, charts and the page. May import
`coreset` and below, never `training`. The only room that imports matplotlib. Start with `read`,
then `page`.
"""

# modules that other rooms may import
__all__ = ["accuracy", "page", "published", "read", "results", "review", "scores"]
