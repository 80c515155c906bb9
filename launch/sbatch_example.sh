#!/usr/bin/env bash
# One stage on several nodes with srun and torchrun alone, for those who keep their own submission scripts:
#
#   sbatch launch/sbatch_example.sh RUN_DIRECTORY collect my.yaml [key=value ...]
#
# RUN_DIRECTORY is that of the stage (runs/NAME, or runs/NAME/retrain/NAME). The job leaves before its time limit, saved, and
# is queued again until the stage is done; preempted or after the loss of a node it goes on as well. `tdds submit` does all that,
# and the pipeline around it.
#SBATCH --job-name=tdds
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1          # one torchrun per node, which starts the ranks
#SBATCH --cpus-per-task=1            # of all ranks of a node
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=tdds-%j.out
##SBATCH --gpus-per-node=8           # on GPUs; one rank on each
##SBATCH --partition=gpu
set -uo pipefail
[ $# -ge 2 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
run=$1
shift
cd "${SLURM_SUBMIT_DIR:?submit it by sbatch}" || exit 1
python=${PYTHON:-python3}            # that of the environment with tdds_dist, on all nodes
"$python" -c 'import tdds_dist, torch' || {
    echo "$python has no tdds_dist: activate its environment before sbatch, or sbatch --export=ALL,PYTHON=/path/to/python" >&2
    exit 2; }

# A rendezvous of its own for every start: what is left of the one before may still hold the port.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + (SLURM_JOB_ID + 4001 * ${SLURM_RESTART_COUNT:-0}) % 12768))
ranks=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
# Two minutes before the time limit the run saves and leaves by itself; a predecessor that still dies is waited for.
end=$(squeue -h -j "$SLURM_JOB_ID" -o %e)
[[ $end == [0-9]* ]] && export TDDS_LEAVE_AT=$(($(date -d "$end" +%s) - 120))
export TDDS_LOCK_WAIT_SECONDS=180 TDDS_JOB=$SLURM_JOB_ID OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
last=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tail -n 1)
ended=$PWD/.tdds-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}.ended   # there when the ranks of a node have ended
rm -f "$ended"
export python ranks last ended MASTER_ADDR MASTER_PORT
started=$(mktemp)                    # what status.json said before means nothing

# For hours srun waits to hear of a node that it no longer reaches.
(while sleep 20 && kill -0 $$; do [ ! -e "$ended" ] || { sleep 60; pkill -P $$ -x srun; }; done) >/dev/null 2>&1 &
watch=$!; disown

# shellcheck disable=SC2016  # expanded on each node
srun --kill-on-bad-exit=1 --wait=30 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" bash -c '
    [ "$SLURM_NODEID" = 0 ] && peer=$last || peer=$MASTER_ADDR
    interface=$("$python" -c "import tdds_dist.launch.rendezvous as n, sys; print(n.interface_to(sys.argv[1]) or \"\")" "$peer")
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-${interface:+=$interface}}
    trap : TERM  # the ranks get it too, save, and leave
    "$python" -m torch.distributed.run --nnodes "$SLURM_JOB_NUM_NODES" --node-rank "$SLURM_NODEID" --nproc-per-node "$ranks" \
        --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" -m tdds_dist "$@"
    code=$?; touch "$ended"; exit $code' bash "$@"
code=$?
kill $watch
rm -f "$ended"

# torchrun has one exit code for every failure; status.json says whether the run was asked to leave and has saved.
if [ $code -ne 0 ] && [ "$run/status.json" -nt "$started" ] && grep -q '"state": "stopped"' "$run/status.json" 2>/dev/null; then
    echo "not finished: queued again"
    scontrol requeue "$SLURM_JOB_ID"
fi
rm -f "$started"
exit $code
