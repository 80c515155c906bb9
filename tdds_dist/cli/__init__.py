"""The command line: options (`parser`), what each command does with them (`commands`), what it
says at its end (`outcome`), what it needs around it (`surroundings`), and exit codes (`main`). May
import every room of the package; does not know `launch`, whose commands are handed in.
"""

__all__ = ["commands", "main", "outcome", "parser"]  # that other rooms may import
