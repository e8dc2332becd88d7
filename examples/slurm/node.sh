#!/usr/bin/env bash
# Runs a command on one node of a job, as srun starts it (job.sh): node.sh FOLDER COMMAND…
#
# It gives the command its node's rank and a folder for its ranks' logs, passes stop signals on to it, and leaves its exit
# code in FOLDER/NODE/exit_code: srun alone knows no more than the largest of all nodes.
set -euo pipefail
# shellcheck source=examples/slurm/await.sh
source "$(dirname "${BASH_SOURCE[0]}")/await.sh"

CHILD=''
# shellcheck disable=SC2329 # the trap calls it
stop() {
    SIGNALLED=1
    [ -z "$CHILD" ] || kill -s USR2 "$CHILD" 2>/dev/null || true
}
trap stop USR2 TERM

FOLDER=$1/$SLURMD_NODENAME
shift
mkdir -p "$FOLDER"
export NODE_RANK=$SLURM_NODEID
# Each rank's output into files of its own, and into the job's log.
export LAUNCH_ARGS="--log-dir $FOLDER --redirects 3 --tee 3 ${LAUNCH_ARGS:-}"
if [ -z "${NPROC_PER_NODE:-}" ] && [ -n "${SLURM_GPUS_ON_NODE:-}" ]; then
    export NPROC_PER_NODE=$SLURM_GPUS_ON_NODE
fi

"$@" &
CHILD=$!
code=0
await "$CHILD" || code=$?
echo "$code" >"$FOLDER/exit_code"
exit "$code"
