#!/usr/bin/env bash
#SBATCH --job-name=nanochat
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=1-00:00:00
#SBATCH --signal=TERM@900
#SBATCH --requeue
#SBATCH --open-mode=append
#
# speedrun.sh on several machines, from the repository's folder and with its flags; #SBATCH lines are defaults of sbatch's:
#
#   sbatch --nodes=4 scripts/slurm.sh --run large --data hub --depth 32
#
# The repository and $NANOCHAT_BASE_DIR must be in folders that all machines see; the number of GPUs in all must be a
# power of two. Fifteen minutes before its time is over training is told to stop, and saves; the same command goes on.
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
(. scripts/venv.sh) # once, before all of them look for it
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
exec srun --kill-on-bad-exit=1 bash speedrun.sh "$@"
