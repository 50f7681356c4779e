#!/bin/sh
# Nodes on the hosts that Slurm gives, a program on the first: sbatch slurm.sh. Home directories are shared, and with
# them the secret. The nodes dial the program, so that none of them needs a port that can be reached.
#SBATCH --nodes=4 --ntasks-per-node=1 --exclusive --time=01:00:00
srun dispynode --daemon --scheduler-host "$(hostname)" &
python3 my_program.py   # dispy.JobCluster(compute, host='', ...): it waits for nodes to dial it
scancel --signal=TERM --full "$SLURM_JOB_ID"   # the nodes: running jobs get their grace
