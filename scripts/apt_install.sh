#!/usr/bin/env bash
# Installs Debian packages (root). Waits up to 10 minutes while another program holds a lock of apt.
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8
log=$(mktemp)
trap 'rm -f "$log"' EXIT
end=$((SECONDS + 600))
until { apt-get update -qq && apt-get install -y -qq --no-install-recommends "$@"; } >"$log" 2>&1 </dev/null; do
    if ! grep -qE '(get|acquire|lock) .*lock' "$log" || ((SECONDS > end)); then
        tail -n 30 "$log" >&2
        exit 1
    fi
    sleep 3
done
