#!/usr/bin/env bash
# Sets up what `make demo` and `make test` need: system packages, .venv, this package in it. Safe to run again.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
say() { printf '\033[1m== %s\033[0m\n' "$*" >&2; }
[ -t 2 ] || say() { printf '== %s\n' "$*" >&2; }

exec 9>.setup-lock; flock 9 2>/dev/null || :  # several `make` may come here at once

# FFCV compiles one C++ file against OpenCV and libjpeg-turbo; the demo and tests need nothing else from the system.
missing=()
command -v g++ >/dev/null || missing+=(g++)
command -v pkg-config >/dev/null || missing+=(pkg-config)
pkg-config --exists opencv4 2>/dev/null || missing+=(libopencv-dev)
pkg-config --exists libturbojpeg 2>/dev/null || missing+=(libturbojpeg0-dev)
[[ $(/sbin/ldconfig -p 2>/dev/null) == *libtbb.so.12* ]] || [ -e "${CONDA_PREFIX:-/nowhere}/lib/libtbb.so.12" ] || missing+=(libtbb12)
missing_python=()
if ! command -v "$python" >/dev/null; then missing_python=(python3 python3-venv python3-dev)
elif ! "$python" -c 'import sys, ensurepip, sysconfig, os; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' 2>/dev/null
then missing_python=(python3-venv python3-dev); fi

all=("${missing[@]}" "${missing_python[@]}")
if ((${#all[@]})) && { [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; }; then
    cat >&2 <<TXT
These system packages are missing: ${all[*]}
Get them, then run this again:
  Debian, Ubuntu:  sudo apt-get install ${all[*]}
  conda:           conda install -c conda-forge cxx-compiler pkg-config opencv libjpeg-turbo tbb python=3.11
TXT
    exit 1
fi
if ((${#missing_python[@]})); then
    say "installing system packages: ${missing_python[*]}"
    scripts/apt_install.sh "${missing_python[@]}"
fi
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "$python is $("$python" -V); Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11" >&2; exit 1; }

system=
if ((${#missing[@]})); then  # beside torch: both take minutes, and only FFCV needs both
    say "installing system packages: ${missing[*]}"
    scripts/apt_install.sh "${missing[@]}" 9>&- &
    system=$!
fi
need_system() { wait $system || { echo "the system packages could not be installed, see above: ${missing[*]}" >&2; exit 1; }; }
stamp=.venv/.installed-$(cat pyproject.toml constraints.txt | sha256sum | cut -c1-16)
if [ ! -e "$stamp" ]; then
    say "installing Python packages into .venv (torch is the large one, about 5 GB with CUDA libraries; minutes)"
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    install() {
        .venv/bin/python -m pip install --disable-pip-version-check --no-compile -c constraints.txt "$@" |
            sed -unE '/^(Collecting|  Downloading|Building|Installing|Successfully)/{s/^(.{110}).*/\1/;p}' >&2
    }
    # pip works on one package after the other: torch, Triton and CUDA's libraries come beside what needs none of them. Should one
    # of the two fail, the last step gets what is missing, or fails.
    mapfile -t rest < <(.venv/bin/python - <<'PYTHON'
import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
needed = project["dependencies"] + project["optional-dependencies"]["dev"]
print(*[line for line in needed if not line.startswith(("torch", "ffcv"))], sep="\n")
PYTHON
    )
    set -m; PIP_NO_INPUT=1 install "${rest[@]}" </dev/null & beside=$!; set +m
    trap 'kill -- -$beside 2>/dev/null || true' EXIT
    trap 'exit 130' INT  # pip ends with an ordinary failure
    libraries=()
    [[ $(env; .venv/bin/python -m pip config list) == */whl/* ]] || mapfile -t libraries < <(grep -oE '^(triton|nvidia-\S+)' constraints.txt)
    install --no-deps torch torchvision "${libraries[@]}" || true
    wait $beside || true
    trap - EXIT INT
    need_system
    install -e '.[dev]'
    # What most commands load, so that not each of them compiles it where Python is told to keep nothing.
    PYTHONDONTWRITEBYTECODE= .venv/bin/python -c 'import tdds_dist.__main__, tdds_dist.training.collect, torch.distributed.run, torch.utils.tensorboard, matplotlib.pyplot, jinja2, pyarrow.parquet, sklearn.cluster' || true
    rm -f .venv/.installed-*
    touch "$stamp"
    say "ready: .venv/bin/tdds --help"
fi
need_system
