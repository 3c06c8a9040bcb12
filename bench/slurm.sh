#!/bin/bash
# R1-Zero on a Slurm cluster: a loop around torchrun on every node; before the time limit the run is
# saved, and the job goes back into the queue.
#
#   sbatch bench/slurm.sh                                  from the root of the repository
#   sbatch --nodes=4 bench/slurm.sh --steps 800            more flags of train_zero.py
#
# --out must be on a file system that all nodes share. Adapt the GPUs of a node and TRAIN.
#SBATCH --job-name=nanor1 --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=64
#SBATCH --time=04:00:00 --signal=B:TERM@120 --requeue
#SBATCH --open-mode=append --output=slurm-%j.log

GPUS=8
TRAIN=(train_zero.py --preset gsm8k --model Qwen2.5-3B --dtype bfloat16 --recompute --timeout 600
       --data train.jsonl --test-data test.jsonl --out "runs/slurm-$SLURM_JOB_ID" --resume)
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # else a lost worker is not recovered
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100   # seconds to save in; torchrun's own are 30
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / GPUS))

# torchrun's flags but is_host, which is 1 on the node that keeps the rendezvous.
RUN=(torchrun "--nnodes=1:$SLURM_NNODES" "--nproc-per-node=$GPUS" --max-restarts=10
     --rdzv-backend=c10d "--rdzv-id=$SLURM_JOB_ID"
     "--rdzv-endpoint=$HEAD:$((20000 + SLURM_JOB_ID % 20000))")
ON_EACH_NODE='
    trap STOP=1 TERM
    HOST=$((SLURM_NODEID == 0))
    CONF="--rdzv-conf=is_host=$HOST,last_call_timeout=30"
    N=$1; shift
    for TRY in 1 2 3 4 5 6 7 8 9 10; do
        "${@:1:N}" "$CONF" "${@:N+1}" && exit 0
        [ -n "$STOP" ] && exit 143
        sleep 2
    done
    exit 1'
srun --kill-on-bad-exit=0 bash -c "$ON_EACH_NODE" node "${#RUN[@]}" "${RUN[@]}" "${TRAIN[@]}" "$@" &

# Slurm tells only this script (B:). torchrun passes the signal on, and the ranks save and end.
trap 'STOP=1; scancel --signal=TERM "$SLURM_JOB_ID.0"' TERM
wait $!
CODE=$?
if [ -n "$STOP" ]; then
    wait $! # the trap ended the first one
    scontrol requeue "$SLURM_JOB_ID" # the same number, so the same --out
fi
exit $CODE
