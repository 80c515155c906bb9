#!/usr/bin/env bash
# The paper's tables and figures in small, on 1,797 real images: every experiment of configs/experiments/digits_*.yaml, and its report.
# Under two hours on 2 cores. Started again, it goes on where it was; what is done is not repeated.
# Arguments change keys of every experiment, e.g. `scripts/paper_on_digits.sh 'seeds=[0]'`; JOBS runs go at a time.
set -uo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TORCH_CPP_LOG_LEVEL=ERROR
jobs=${JOBS:-2}
started=$SECONDS
step() { printf '\n[%3d min] %s\n' $(((SECONDS - started) / 60)) "$*"; }
write() {
    local file=data/digits_$1.beton
    [ -e "$file" ] || tdds write digits "$file" "${@:2}" || exit
}

step "images"
write train --split train
write val --split val
write corrupt20_train --split train --corrupt 0.2 --seed 0
write noise20_train --split train --label-noise 0.2 --seed 0

# first the table whose collections others take over
files=(configs/experiments/digits_table1.yaml)
for file in configs/experiments/digits_*.yaml; do
    [ "$file" = "${files[0]}" ] || files+=("$file")
done
failed=()
for file in "${files[@]}"; do
    name=$(basename "$file" .yaml)
    step "$name"
    tdds experiment "$file" --jobs "$jobs" "$@" && tdds report "runs/$name" --quiet
    code=$?
    [ $code -lt 75 ] || exit $code # interrupted
    [ $code -eq 0 ] || failed+=("$name")
done

step "summary"
for file in "${files[@]}"; do
    name=$(basename "$file" .yaml)
    done=$(grep -o '[0-9]* of [0-9]* retrainings done' "runs/$name/table.md" 2>/dev/null || echo "nothing done")
    printf '%-16s %-32s %s\n' "$name" "$done" "runs/$name/table.md, runs/$name/report.html"
done
[ ${#failed[@]} -eq 0 ] || printf 'failed: %s; correct the cause and run this again\n' "${failed[*]}" >&2
[ ${#failed[@]} -eq 0 ]
