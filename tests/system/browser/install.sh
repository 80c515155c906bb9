#!/usr/bin/env bash
# Installs a Chromium for the tests of the report, unless there is one. tests/system/browser/chromium.py looks for the same names.
set -euo pipefail
[ -n "${CHROMIUM:-}" ] && exit 0
for name in chromium chromium-browser google-chrome google-chrome-stable; do
    command -v "$name" >/dev/null && exit 0
done
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "the browser tests need a Chromium or Chrome (Debian: chromium; elsewhere: CHROMIUM=/path/to/it)" >&2
    exit 1
fi
echo "== installing for the browser tests: chromium" >&2
"$(dirname "$0")/../../../scripts/apt_install.sh" chromium fonts-dejavu-core
