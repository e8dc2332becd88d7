#!/usr/bin/env bash
# Starts a real Slurm on this machine, two nodes of one CPU each, for tests and for trying a job script out:
#
#   tests/slurm/start.sh /tmp/slurm && export SLURM_CONF=/tmp/slurm/slurm.conf
#   sinfo; sbatch …
#   tests/slurm/stop.sh /tmp/slurm
#
# Settings, logs and state lie in the folder; ports and job ids are its own, so several can run beside each other. Needs
# Debian's slurm-wlm and munge and installs them where it is root. Exit code 69 says that they cannot be had here.
set -euo pipefail

fail() {
    echo "start.sh: $2" >&2
    exit "$1"
}

[ $# = 1 ] || fail 2 "needs a FOLDER for settings, logs and state"
mkdir -p "$1"
unset CDPATH # with it cd goes elsewhere, and prints where
FOLDER=$(cd "$1" && pwd)
[ ! -e "$FOLDER/slurm.conf" ] || fail 2 "$FOLDER: a Slurm was started there before; stop it with stop.sh, or name another folder"
[[ $FOLDER =~ ^[A-Za-z0-9_./-]{1,90}$ ]] || fail 2 "$FOLDER: too long for a socket, or with odd characters; name another folder"

export PATH=$PATH:/usr/sbin
if ! { command -v slurmctld && command -v slurmd && command -v munged; } >/dev/null; then
    [ "$(id -u)" = 0 ] || fail 69 "Slurm is not installed: as root, apt-get install slurm-wlm munge"
    command -v apt-get >/dev/null || fail 69 "Slurm is not installed, and there is no apt-get: install Slurm and munge"
    export DEBIAN_FRONTEND=noninteractive
    { timeout 60 apt-get update && timeout 120 apt-get install -y --no-install-recommends slurm-wlm munge; } \
        >"$FOLDER/install.log" 2>&1 </dev/null ||
        fail 69 "Slurm could not be installed: $(tail -n 1 "$FOLDER/install.log")"
fi

# Three ports nobody listens on: of the controller and of either node.
port=$((20000 + RANDOM % 10000)) PORTS=()
while [ ${#PORTS[@]} -lt 3 ]; do
    port=$((port + 1))
    (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null || PORTS+=("$port")
done

USER_NAME=$(id -un)
cat >"$FOLDER/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=${PORTS[0]}
SlurmUser=$USER_NAME
SlurmdUser=$USER_NAME
AuthType=auth/munge
# cred_expire is also how long a requeued job waits; Slurm's default is 120 seconds.
AuthInfo=socket=$FOLDER/munge.socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation=$FOLDER/state
SlurmdSpoolDir=$FOLDER/spool-%n
SlurmctldPidFile=$FOLDER/slurmctld.pid
SlurmdPidFile=$FOLDER/slurmd-%n.pid
SlurmctldLogFile=$FOLDER/slurmctld.log
SlurmdLogFile=$FOLDER/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
SchedulerParameters=sched_interval=1,batch_sched_delay=0
# So that jobs of two Slurms beside each other take different ports, where a job's id gives its port.
FirstJobId=$((PORTS[0] % 10000 * 5 + 1))
NodeName=n1 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=${PORTS[1]} CPUs=1 State=UNKNOWN
NodeName=n2 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=${PORTS[2]} CPUs=1 State=UNKNOWN
PartitionName=test Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
CONF
# slurmstepd needs one, though nothing here is confined by cgroups.
echo CgroupPlugin=cgroup/v1 >"$FOLDER/cgroup.conf"
mkdir "$FOLDER/state"
export SLURM_CONF=$FOLDER/slurm.conf

# undo WHY: a Slurm that did not come up leaves no processes behind
undo() {
    "$(dirname "${BASH_SOURCE[0]}")/stop.sh" "$FOLDER"
    fail 1 "$1; see the logs in $FOLDER"
}

(umask 077 && head -c 1024 /dev/urandom >"$FOLDER/munge.key")
# --force: the folder may be the user's own (0700), which munged takes for a mistake.
munged --force --socket "$FOLDER/munge.socket" --key-file "$FOLDER/munge.key" --pid-file "$FOLDER/munged.pid" \
    --log-file "$FOLDER/munged.log" --seed-file "$FOLDER/munged.seed" 2>"$FOLDER/munged.err" || undo "munged does not start"
slurmctld -f "$SLURM_CONF" || undo "slurmctld does not start"
for node in n1 n2; do
    slurmd -f "$SLURM_CONF" -N "$node" || undo "slurmd of $node does not start"
done
for ((attempt = 0; attempt < 30; attempt++)); do
    [ "$(timeout 5 sinfo --noheader --Node --format %t 2>/dev/null)" != $'idle\nidle' ] || exit 0
    sleep 1
done
undo "the nodes do not become idle"
