#!/usr/bin/env bash
# The whole flow on 1,797 real images: write, collect on two ranks, select, retrain, report. Some 5 minutes on 2 cores.
# Arguments change keys of the config for every training, e.g. `scripts/demo.sh train.lr=0.1`; another place needs DEMO_RUN and
# DEMO_DATA and the keys run.dir, data.train and data.val.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TORCH_CPP_LOG_LEVEL=ERROR
ranks=${RANKS:-2}
run=${DEMO_RUN:-runs/demo} data=${DEMO_DATA:-data}
settings=(run.name=demo run.device=cpu "$@")
started=$SECONDS
step() { printf '\n[%3d s] %s\n' $((SECONDS - started)) "$*"; }
do_() { printf '$ %s\n' "$*"; "$@"; }
distributed() { do_ torchrun --standalone --nproc-per-node "$ranks" -m tdds_dist "$@"; }

if [ -e "$run" ]; then
    aside=$(dirname "$run")/before-$(date +%Y%m%dT%H%M%S)
    mkdir -p "$aside" && mv "$run" "$aside/"
    printf 'the run that was there is moved aside to %s\n' "$aside"
fi
step "1/5 write: scikit-learn's digits as JPEG into .beton files"
for split in train val; do
    do_ tdds write digits "$data/digits_$split.beton" --split "$split" --overwrite
done
step "2/5 collect: train on all of them on $ranks ranks, score every image on the way"
distributed collect configs/digits.yaml "${settings[@]}"
step "3/5 score and select: every other score from the same run; coresets at pruning rates 0.5 and 0.8, by TDDS and at random"
do_ tdds score "$run" --all
for rate in 0.5 0.8; do
    do_ tdds select "$run" --pruning-rate "$rate" --out "$run/coresets/tdds_p$rate.npz"
    do_ tdds select "$run" --pruning-rate "$rate" --score random --out "$run/coresets/random_p$rate.npz"
done
step "4/5 retrain: on each coreset from scratch, for the same number of epochs (Strategy-E)"
for coreset in tdds_p0.5 random_p0.5 tdds_p0.8 random_p0.8; do
    distributed retrain configs/digits.yaml "${settings[@]}" --coreset "$run/coresets/$coreset.npz" --strategy E --name "$coreset"
done
step "5/5 report"
do_ tdds report "$run"
step "done"
