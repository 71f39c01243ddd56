#!/bin/bash
# Run job.sbatch under a real Slurm on this one machine, then take everything down again.
#
#     sudo JAXSYS_PYTHON=.venv/bin/python experiments/cluster/slurm_one_machine.sh
#
# About 30 s once Debian's slurm-wlm and munge are installed (it installs them if they are not).
# Expected: four lines "process I of 4 (joined by slurm, …): psum = 10".
# What it printed is kept in results/slurm.txt. All of Slurm's files are in a temporary folder.
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${JAXSYS_PYTHON:=$(command -v python3)}"
JAXSYS_PYTHON=$(cd "$(dirname "$JAXSYS_PYTHON")" && pwd)/$(basename "$JAXSYS_PYTHON")
export JAXSYS_PYTHON PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" JAX_PLATFORMS=cpu
export PATH="$PATH:/usr/sbin:/sbin"

if [ "$(id -u)" != 0 ]; then
    echo "this is user $(id -un); slurmd needs root to start jobs; run it with sudo" >&2
    exit 2
fi
if ! command -v slurmctld >/dev/null || ! command -v munged >/dev/null; then
    if ! command -v apt-get >/dev/null; then
        echo "slurmctld and munged are missing; install Slurm and munge" >&2
        exit 2
    fi
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        slurm-wlm munge >/dev/null
fi

work=$(mktemp -d)
daemons=()
stop() {
    for pid in "${daemons[@]}"; do kill "$pid" 2>/dev/null || true; done
    for pid in "${daemons[@]}"; do wait "$pid" 2>/dev/null || true; done
    rm -rf "$work"
}
trap stop EXIT
chmod 755 "$work"
mkdir "$work/state" "$work/spool" "$work/munge"
chmod 711 "$work/munge"

# munge vouches for who sends a message; its own key and socket leave an installed one alone
head -c 1024 /dev/urandom >"$work/munge.key"
chmod 400 "$work/munge.key"
munged --foreground --force --key-file="$work/munge.key" --socket="$work/munge/socket" \
    --log-file="$work/munged.log" --pid-file="$work/munged.pid" --seed-file="$work/munge.seed" \
    2>"$work/munged.err" &
daemons+=($!)

# The node is called localhost, because JAX's coordinator is looked up under the node's name.
# config_overrides: eight slots even on a smaller machine. linuxproc and task/none: no cgroups.
cat >"$work/slurm.conf" <<CONF
ClusterName=one
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$work/munge/socket
CredType=cred/munge
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdLogFile=$work/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
NodeName=localhost NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 CPUs=8
PartitionName=all Nodes=localhost Default=YES MaxTime=10 State=UP
CONF
if [ "$(slurmctld -V | grep -oE '[0-9]+' | head -1)" -ge 23 ]; then
    echo "CgroupPlugin=disabled" >"$work/cgroup.conf"
fi
export SLURM_CONF=$work/slurm.conf

for _ in $(seq 100); do [ -S "$work/munge/socket" ] && break; sleep 0.1; done
slurmctld -D 2>/dev/null &
daemons+=($!)
slurmd -D 2>/dev/null &
daemons+=($!)
for _ in $(seq 300); do sinfo -h -o %T 2>/dev/null | grep -q idle && break; sleep 0.1; done
if ! sinfo -h -o %T | grep -q idle; then
    echo "Slurm did not come up; the last lines of its logs:" >&2
    tail -n 20 "$work"/*.log >&2
    exit 1
fi

echo "\$ slurmctld -V"
slurmctld -V
echo "\$ sinfo"
sinfo
echo "\$ sbatch --wait experiments/cluster/job.sbatch"
code=0
timeout 240 sbatch --wait --output="$work/job.out" experiments/cluster/job.sbatch || code=$?
grep -v '^[0-9]*: \[Gloo\]' "$work/job.out" | grep . | sort || true
echo "exit status $code"
exit "$code"
