"""The surroundings of a program: open standard streams, a user's name, and folders where libraries
keep compiled code. Containers and services leave some of it out, and libraries then end in a
traceback; what is missing is filled in here, before they are imported.
"""

import getpass
import io
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EIO, ENOSPC, EPIPE
from pathlib import Path
from typing import TextIO

from tdds_dist.errors import InputError

# ---- a user's name, and folders for compiled code


def fill_in_caches() -> list[str]:
    """Give the libraries a user's name and folders that can be written, where they would find none;
    what is there already stays.

    Return one sentence for each variable of the environment that had to be replaced. Raises
    InputError when no folder can be written at all.
    """
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user id without an entry in /etc/passwd
        user = os.environ["LOGNAME"] = f"uid{os.getuid()}"
    said = []
    for variable, usual in _usual_folders(user).items():
        given = os.environ.get(variable)
        if given and _can_be_written(Path(given)):
            continue
        if not given and any(map(_can_be_written, usual)):
            continue
        os.environ[variable] = str(_own_folder() / variable.removesuffix("_DIR").lower())
        if given:
            said.append(
                f"{variable}={given} cannot be written, {os.environ[variable]} is used instead"
            )
    return said


def _usual_folders(user: str) -> dict[str, list[Path]]:
    """Return the folders that a library would try, by the variable that replaces them all."""
    home = Path(os.path.expanduser("~"))  # stays relative where there is none
    cache = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    package = Path(__file__).parents[1]
    folders = {
        "NUMBA_CACHE_DIR": [package / "data" / "__pycache__", cache / "numba"],
        "MPLCONFIGDIR": [cache / "matplotlib"],
        "TORCHINDUCTOR_CACHE_DIR": [],
        "TRITON_CACHE_DIR" if "TRITON_CACHE_DIR" in os.environ else "TRITON_HOME": [home],
    }
    with suppress(FileNotFoundError):  # no folder for temporary files
        folders["TORCHINDUCTOR_CACHE_DIR"] = [Path(tempfile.gettempdir(), f"torchinductor_{user}")]
    return folders


def _can_be_written(folder: Path) -> bool:
    """Say whether this folder can be written, or made."""
    if not folder.is_absolute():
        return False
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    return os.path.isdir(there) and os.access(there, os.W_OK | os.X_OK)


def _own_folder() -> Path:
    """Return a folder for temporary files that only this user can write, the same for all processes
    of a machine where that is possible."""
    try:
        folder = Path(tempfile.gettempdir(), f"tdds-{os.getuid()}")
    except FileNotFoundError as error:
        raise InputError(
            "no folder can be written for what numba and torch compile: not the home directory, nor"
            " TMPDIR, /tmp, /var/tmp or the working directory; set TMPDIR to a folder that can be"
            " written"
        ) from error
    with suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
        if is_own and not found.st_mode & 0o022:
            return folder
    return Path(tempfile.mkdtemp(prefix="tdds-"))


# ---- standard streams


def open_standard_streams() -> None:
    """Make all three standard streams usable: one that is closed leads nowhere, so that no file
    that is opened later takes its number; one that its reader left is no reason to stop."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, this one
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115 - for the life of the process
    sys.stdout = _patient(sys.stdout, {EPIPE, EIO})
    sys.stderr = _patient(sys.stderr, {EPIPE, EIO, ENOSPC})


class PatientStream(io.TextIOWrapper):
    """A standard stream whose reader may leave early (`tdds check FILE | head`): the stage goes on,
    and its outcome counts. Signs that its encoding lacks are written as escapes.

    Raises InputError for other errors (a full disk); what is written later goes nowhere as well.
    """

    endured: set[int]  # numbers of errors that are no reason to stop
    before: TextIO  # it shares the buffer, and would close it at its end

    def write(self, text: str) -> int:
        with self._enduring():
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with self._enduring():
            super().flush()

    @contextmanager
    def _enduring(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            if error.errno not in self.endured:
                raise InputError(
                    f"cannot write to {self.name.strip('<>')} ({error.strerror}); free space there,"
                    " or send it elsewhere"
                ) from error


def _patient(stream: TextIO | None, endured: set[int]) -> TextIO:
    if stream is None:
        return open(os.devnull, "w")
    if not isinstance(stream, io.TextIOWrapper):
        return stream  # somebody else's
    patient = PatientStream(
        stream.buffer,
        stream.encoding,
        "backslashreplace" if stream.errors == "strict" else stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
    patient.endured, patient.before = endured, stream
    return patient
