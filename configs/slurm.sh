#!/bin/bash
# Four machines of eight GPUs. A job that is preempted or runs out of time gets SIGTERM ten minutes before. The run then
# leaves its rollout or finishes its update, saves and exits. When the job is queued again, the same command continues
# with `--resume latest`, which is added here unless you give a --resume of your own. `--resume CHECKPOINT` with a new
# --output begins a new run, and continues that run when the job is queued again.
#     sbatch configs/slurm.sh bpgo.py --model flux --output /shared/runs/flux
#SBATCH --job-name=vgrpo
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=570  # seconds that the launcher leaves its processes for that; default: 30
# By default the launcher hands on only the first four. On one of the last two it ends without its
# processes.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2
export MAIN_ADDRESS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export GPUS=${SLURM_GPUS_PER_NODE:-8}
case " $* " in *" --resume"[\ =]*) ;; *) set -- "$@" --resume latest ;; esac

# "$@" keeps each argument one word, for example a folder with a space or a regular expression
srun bash -c 'accelerate launch --config_file configs/fsdp2_multi_node.yaml \
    --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * GPUS)) --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$MAIN_ADDRESS" --main_process_port 29500 "$@"' bash "$@"
