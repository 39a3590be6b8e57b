#!/bin/bash
# A job for SLURM's queue. From the repository's root:
#
#     sbatch launchers/slurm_job.sh                                  submits it, and prints its number
#     sbatch -N4 launchers/slurm_job.sh --job digits --epochs 20     sbatch's flags go before, slurm.py's behind the file
#     squeue --me                                                    waiting (PD) or running (R)?
#     tail -f slurm-NUMBER.out                                       what it prints
#     scancel NUMBER                                                 ends it
#
# The lines that begin with #SBATCH are sbatch's flags: what the job needs, and may take at most.
#SBATCH --job-name=launchlab
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=2        # a task is a rank: one per GPU, or per part of the cores
#SBATCH --cpus-per-task=1          # cores, and by that threads, of each rank
#SBATCH --time=00:30:00            # more than this and it is ended; less waits shorter
#SBATCH --signal=INT@60            # a minute before that: Ctrl-C for every rank, so that the run ends by itself
#SBATCH --output=slurm-%j.out      # %j: the job's number
# #SBATCH --gpus-per-node=2        # your cluster may want more: --partition, --account, --gpus-per-node, --mem
# (A # more before #SBATCH and sbatch does not read the line.)

set -euo pipefail

# What this script says runs once, on the first node. Only what srun starts runs on all of them.
echo "Job $SLURM_JOB_ID: $SLURM_NTASKS ranks on $SLURM_JOB_NODELIST"

# The environment in which LaunchLab is installed, if it is not yet active: sbatch passes on the one that it was typed in.
if [ -z "${VIRTUAL_ENV:-}" ] && [ -f .venv/bin/activate ]; then
  source .venv/bin/activate
fi

# srun does not take over sbatch's --cpus-per-task by itself (since SLURM 22.05).
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"

# -K: when a task fails, SLURM ends the others too, instead of letting them wait; slurm.py's own watch does so without it.
srun -K python launchers/slurm.py "$@"

# With torchrun it would be one task a node with all of its cores, and torchrun starts the ranks there (delete the line above):
#
#   master=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
#   srun -K --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --cpus-per-task="$SLURM_CPUS_ON_NODE" \
#     torchrun --nnodes="$SLURM_NNODES" --nproc_per_node=2 --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" \
#     --rdzv_endpoint="$master:$((10000 + SLURM_JOB_ID % 20000))" launchers/torchrun.py "$@"
