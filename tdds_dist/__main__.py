"""The program `tdds`, also `python -m tdds_dist`: the command line with the commands of the
launcher. Nothing else in this package knows `launch`."""

from collections.abc import Sequence

from tdds_dist.cli import main as cli
from tdds_dist.launch.doctor import extend_doctor
from tdds_dist.launch.status import add_logs, add_status
from tdds_dist.launch.submit import add_submit

COMMANDS = (extend_doctor, add_submit, add_status, add_logs)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    return cli.main(arguments, COMMANDS)


def run() -> None:
    """Run one command and leave the process with its exit code."""
    cli.run(COMMANDS)


if __name__ == "__main__":
    run()
