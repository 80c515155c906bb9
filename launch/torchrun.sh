#!/usr/bin/env bash
# Run one stage on this machine, one rank per GPU: launch/torchrun.sh collect CONFIG.yaml [key=value ...]
# RANKS=N chooses the number of ranks; without it: one per visible GPU, or a single one on the CPU.
set -euo pipefail
[ $# -gt 0 ] || { sed -n '2,3s/^# //p' "$0" >&2; exit 2; }
bin=$(dirname "$0")/../.venv/bin
[ -x "$bin/torchrun" ] && PATH=$(cd "$bin" && pwd):$PATH

visible_gpus() {
    if [ "${CUDA_VISIBLE_DEVICES+set}" ]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true
    elif command -v nvidia-smi >/dev/null; then
        nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true
    else
        echo 0
    fi
}
if [ -z "${RANKS:-}" ]; then
    RANKS=$(visible_gpus)
    [ "$RANKS" -gt 0 ] || RANKS=1
fi
if [ -z "${OMP_NUM_THREADS:-}" ]; then
    OMP_NUM_THREADS=$(($(nproc) / RANKS))
    [ "$OMP_NUM_THREADS" -gt 0 ] || OMP_NUM_THREADS=1
fi
export OMP_NUM_THREADS
exec torchrun --standalone --nproc-per-node "$RANKS" -m tdds_dist "$@"
