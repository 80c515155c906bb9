#!/usr/bin/env bash
# Installs what tests/system/slurm/cluster.py starts, without starting any service. Does nothing when all is there.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

packages=()
need() { command -v "$1" >/dev/null || packages+=("$2"); }
need slurmctld slurmctld
need slurmd slurmd
need sbatch slurm-client
need slurmdbd slurmdbd
need munged munge
need mariadbd mariadb-server
((${#packages[@]})) || exit 0

if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "the SLURM tests need these Debian packages (or their like), no service of which has to run: ${packages[*]}" >&2
    exit 1
fi

# Package scripts ask policy-rc.d before they start a service; 101 means no. Left alone where the system has its own.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
fi
echo "== installing for the SLURM tests: ${packages[*]}" >&2
"$(dirname "$0")/../../../scripts/apt_install.sh" "${packages[@]}"
