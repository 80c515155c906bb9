"""The images of the Dockerfile and apptainer.def, and the whole way of a dataset as it goes in one: a
user id without a name and a home, and an installation that nobody can write."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs import IN_TURN

ROOT = Path(__file__).parents[2]
UID = 12345
CONFIG = """
run: {name: tiny}
data: {train: train.beton, val: val.beton, num_classes: 3, image_size: 32, crop: resized, mean: [124, 116, 104],
       std: [58, 57, 57]}
model: {name: shufflenet_v2_x0_5}
train: {epochs: 3, global_batch_size: 16, lr: 0.02, warmup_epochs: 0}
score: {preset: official, windows: [{T: 3, K: 3, pruning_rates: [0.5]}]}
"""
# all but the collection, on two ranks, by one process
BEFORE, AFTER = (
    """
write synthetic:96,3,32 train.beton
write synthetic:30,3,32 val.beton --split val
check train.beton
""",
    """
score runs/tiny --score aum
select runs/tiny --pruning-rate 0.5 --score aum
retrain tiny.yaml --coreset runs/tiny/coresets/aum_p0.5.npz --strategy E
export runs/tiny/coresets/aum_p0.5.npz --format parquet
report runs/tiny
""",
)


def test_both_images_are_made_from_the_same_files_by_the_script_of_the_tests():
    let_in = re.findall(r"^!(.+)", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    definition = (ROOT / "apptainer.def").read_text()
    copied = re.findall(r"^    (?!cd )(\S+) /opt/tdds_dist", definition, re.MULTILINE)
    assert let_in == copied
    assert all((ROOT / name).exists() for name in let_in)
    for text in ((ROOT / "Dockerfile").read_text(), definition):
        assert "PIP_NO_CACHE_DIR=1 scripts/setup.sh" in text


@pytest.fixture
def as_nobody(tmp_path):
    """Run shell text in tmp_path as a user without a name, who can write there and in /var/tmp alone;
    skip where that takes more rights than the tests have."""
    if os.getuid() or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs root and the right to mount, to become another user")
    os.chown(tmp_path, UID, UID)
    # reads what root has kept to itself, such as a python in root's home; writes nothing
    reads = "+dac_read_search"
    user = f"--reuid {UID} --regid {UID} --clear-groups --inh-caps {reads} --ambient-caps {reads}"
    mounts = "".join(
        f"mount -o bind {place} {place}; mount -o remount,bind,ro {place}\n"
        for place in map(shlex.quote, {str(ROOT), sys.prefix})
    )

    def run(text, **environment):
        given = " ".join(f"{name}={value}" for name, value in environment.items())
        return subprocess.run(
            [
                *("unshare", "-m", "bash", "-ec"),
                f"{mounts}mount -t tmpfs -o mode=1777 tmpfs /var/tmp\ncd {shlex.quote(str(tmp_path))}\n"
                f"exec setpriv {user} env -i OMP_NUM_THREADS=1 PATH=/usr/bin:/bin {given} "
                f"bash -ec {shlex.quote(text)}",
            ],
            capture_output=True,
            text=True,
            timeout=280,
        )

    return run


@pytest.mark.slow
def test_the_whole_way_as_an_unknown_user_in_a_read_only_installation(as_nobody, tmp_path):
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    python = shlex.quote(sys.executable)
    ranks = f"{python} -m torch.distributed.run --standalone --nproc-per-node 2 -m tdds_dist"
    before, after = (
        f"{python} -c {shlex.quote(IN_TURN)} {shlex.quote(lines)} --quiet"
        for lines in (BEFORE, AFTER)
    )
    text = f"{before}\n{ranks} collect tiny.yaml --quiet\n{after}\n"
    done = as_nobody(
        f"touch {ROOT}/x 2>/dev/null && exit 9\nexport PYTHONPATH={ROOT}\n{text}"
        f"test -d /var/tmp/tdds-{UID}/numba_cache",
        HOME="/nonexistent",
        TMPDIR="/var/tmp",
        GLOO_SOCKET_IFNAME="lo",
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "warning" not in done.stderr.lower(), done.stderr
    assert (tmp_path / "runs/tiny/coresets/aum_p0.5.parquet").is_file()
    assert {path.stat().st_uid for path in (tmp_path / "runs").rglob("*")} == {UID}
