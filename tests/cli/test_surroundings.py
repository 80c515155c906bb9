"""What the program does where a container or a service leaves something out: a user's name, folders
that can be written, standard streams. tests/system/test_containers.py tries all of it at once."""

import getpass
import os
import pwd
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tdds_dist.cli.surroundings import fill_in_caches
from tdds_dist.errors import InputError

VARIABLES = ("NUMBA_CACHE_DIR", "MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_HOME")
NOWHERE = "/dev/null"  # in which nobody makes a file, root neither


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A user id without a name and a home, whose temporary files go to tmp_path."""

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names = ("HOME", "XDG_CACHE_HOME", "TRITON_CACHE_DIR", *VARIABLES)
    for name in (*names, "USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    return tmp_path


@pytest.mark.parametrize("home", [None, NOWHERE, f"{NOWHERE}/x/y", "relative"])
def test_what_is_missing_is_filled_in(bare, monkeypatch, home):
    if home:
        monkeypatch.setenv("HOME", home)
    monkeypatch.setattr("tdds_dist.cli.surroundings.__file__", f"{NOWHERE}/tdds_dist/cli/x.py")
    assert fill_in_caches() == []
    assert getpass.getuser() == f"uid{os.getuid()}"
    own = bare / f"tdds-{os.getuid()}"
    assert os.environ["NUMBA_CACHE_DIR"] == str(own / "numba_cache")
    assert os.environ["MPLCONFIGDIR"] == str(own / "mplconfigdir")
    assert os.environ["TRITON_HOME"] == str(own / "triton_home")
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ  # beside it, under the user's name
    assert own.stat().st_mode & 0o777 == 0o700


def test_what_is_there_stays(bare, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USER", "somebody")
    before = dict(os.environ)
    assert fill_in_caches() == []
    assert dict(os.environ) == before


@pytest.mark.parametrize("variable", [*VARIABLES, "TRITON_CACHE_DIR"])
def test_a_cache_that_cannot_be_written_is_replaced_and_said(bare, monkeypatch, variable):
    monkeypatch.setenv("HOME", str(bare))
    monkeypatch.setenv(variable, f"{NOWHERE}/x")
    (said,) = fill_in_caches()
    assert said.startswith(f"{variable}={NOWHERE}/x cannot be written, {os.environ[variable]} is")
    assert os.environ[variable].startswith(str(bare / f"tdds-{os.getuid()}"))


def test_a_folder_that_others_can_write_is_not_trusted(bare):
    (bare / f"tdds-{os.getuid()}").mkdir()
    (bare / f"tdds-{os.getuid()}").chmod(0o777)
    fill_in_caches()
    assert bare / f"tdds-{os.getuid()}" not in Path(os.environ["MPLCONFIGDIR"]).parents


def test_no_folder_at_all_is_said(bare, monkeypatch):
    def none():
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    with pytest.raises(InputError, match="set TMPDIR to a folder that can be written"):
        fill_in_caches()


@pytest.mark.parametrize(
    "streams", ["<&- >&- 2>&-", "2>&1 | true", "2>/dev/full", "2>&1 >/dev/null | true"]
)
def test_the_work_is_done_without_standard_streams(tmp_path, streams):
    command = f"{sys.executable} -m tdds_dist write synthetic:8,2,16 x.beton --num-workers 1"
    # something to say before the work
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "NUMBA_CACHE_DIR": f"{NOWHERE}/x"}
    shell = ["bash", "-c", f"{command} {streams}; exit ${{PIPESTATUS[0]}}"]
    assert subprocess.run(shell, cwd=tmp_path, env=environment, timeout=60).returncode == 0
    assert sorted(os.listdir(tmp_path)) == ["x.beton", "x.manifest.json"]


def test_a_full_disk_below_standard_output_is_said():
    command = [sys.executable, "-m", "tdds_dist", "--help"]
    with open("/dev/full", "w") as full:
        left = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    cause = "cannot write to stdout (No space left on device)"
    said = f"tdds: error: {cause}; free space there, or send it elsewhere\n"
    assert (left.returncode, left.stderr) == (2, said)


def test_a_program_without_standard_streams_can_use_the_package(tmp_path):
    code = (
        "import sys\n"
        "from tdds_dist.__main__ import main\n"
        "sys.stdin = sys.stdout = sys.stderr = None\n"
        "codes = main(['check', '/none.beton']), main(['write', 'synthetic:8,2,16', 'x.beton'])\n"
        "sys.stdout = sys.__stdout__\n"
        "print(*codes)\n"
    )
    command, env = [sys.executable, "-c", code], os.environ | {"PYTHONPATH": os.getcwd()}
    options = {"capture_output": True, "text": True, "timeout": 60}
    done = subprocess.run(command, cwd=tmp_path, env=env, **options)
    assert (done.stdout, done.stderr) == ("2 0\n", "")
