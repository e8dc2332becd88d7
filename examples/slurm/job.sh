# Runs a job's training, saves before the time limit, and requeues; the job scripts source it and call run_job.
# docs/slurm.md has it in words.
# shellcheck shell=bash
#
# Variables, all optional:
#   MAX_STARTS (3)   starts from the same checkpoint, after which a job gives up
#   CHAIN=1          a successor is submitted where otherwise the job is requeued; SBATCH_ARGS has the options for it
#   EXCLUDE_FILE     nodes to keep away from, one a line; a node that failed alone among several is added
#   DOCTOR=1         python -m megatron_moa.doctor on every node first
#   CONTAINER        an image: for Apptainer if it ends in .sif, else for Pyxis; CONTAINER_MOUNTS (from:to,…)
#   SOCKET_IFNAME    the network interface of NCCL's and gloo's sockets
: "${SCRIPT:?}" "${MEGATRON_MOA_DIR:?}"
unset CDPATH # with it cd goes elsewhere, and prints where
MEGATRON_MOA_DIR=$(cd "$MEGATRON_MOA_DIR" && pwd)
ARGUMENTS=("$@") # the script's own

say() { echo "$SCRIPT: $1" >&2; }

fail() {
    say "$1"
    exit 2
}

# An array's last task has the array's id as its own: by that all tasks would be requeued.
JOB=$SLURM_JOB_ID
[ -z "${SLURM_ARRAY_JOB_ID:-}" ] || JOB=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
mapfile -t NODES < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MAX_STARTS=${MAX_STARTS:-3}

# Why the training was told to stop: limit (time is nearly up: go on later) or user (stay away).
STOPPED='' STEP=''
stop() {
    [ -n "$STOPPED" ] || say "$2"
    STOPPED=${STOPPED:-$1}
    # srun passes it on to every node. It would take SIGTERM for itself and kill them.
    [ -z "$STEP" ] || pass_on USR2 "$STEP"
}
trap 'stop limit "the time limit is near: saving"' USR2
trap 'stop user "told to end: saving"' TERM

# run_job RUN_DIR COMMAND…: runs the command once on every node, and ends or continues the job as it says
run_job() {
    RUN_DIR=$1
    shift
    [[ $RUN_DIR != *[[:space:]]* ]] || fail "RUN_DIR $RUN_DIR: has a space; take a name without"
    [[ $MAX_STARTS =~ ^[1-9][0-9]{0,8}$ ]] || fail "MAX_STARTS $MAX_STARTS: not a number; leave it out for 3"
    is_switch CHAIN DOCTOR
    local word
    for word in "$@"; do
        case $word in
        --save | --save=* | --load | --load=*)
            fail "${word%%=*}: a job goes on from the checkpoints in RUN_DIR; set that (a sweep: SWEEP_DIR), and --pretrained-checkpoint for weights to begin with"
            ;;
        esac
    done
    [ "${CHAIN:-0}" != 1 ] || [ -n "${SBATCH_ARGS+set}" ] ||
        fail "CHAIN=1: SBATCH_ARGS is not set; set it to the options you gave sbatch, which the successor needs, too"
    LOGS=$RUN_DIR/slurm/$JOB-${SLURM_RESTART_COUNT:-0}
    mkdir -p "$LOGS"
    count_start
    avoid_excluded
    set_environment
    say "job $JOB, start $((${SLURM_RESTART_COUNT:-0} + 1)), from iteration $BEGAN_AT: ${NODES[*]}; logs of ranks in $LOGS"
    if [ "${DOCTOR:-0}" = 1 ]; then
        step "${PYTHON:-python}" -m megatron_moa.doctor
        [ "$(exit_codes | sort -u)" = 0 ] || conclude
    fi
    step "$@"
    conclude
}

# The iteration of the latest checkpoint: what progress is measured by.
saved_iteration() { cat "$RUN_DIR/checkpoints/latest_checkpointed_iteration.txt" 2>/dev/null || echo 0; }

# Counts the starts from one checkpoint. Here and not at the end, so that one whose node died is counted too.
count_start() {
    local last
    BEGAN_AT=$(saved_iteration) STARTS=0
    if ((${SLURM_RESTART_COUNT:-0} > 0)) || [ -n "${CHAINED:-}" ]; then # a job that a user submits begins anew
        # None where Slurm requeued the job before it came here, as after a node's failed prologue.
        [ ! -s "$RUN_DIR/slurm/starts" ] || read -r last STARTS <"$RUN_DIR/slurm/starts"
        [ "${last:-}" = "$BEGAN_AT" ] || STARTS=0
    fi
    if ((STARTS >= MAX_STARTS)); then
        say "$STARTS starts from iteration $BEGAN_AT and no new checkpoint: given up; the logs in $RUN_DIR/slurm say why"
        exit 1
    fi
    STARTS=$((STARTS + 1))
    echo "$BEGAN_AT $STARTS" >"$RUN_DIR/slurm/starts"
}

# The nodes of EXCLUDE_FILE, one a line.
excluded_nodes() {
    local list
    [ -s "${EXCLUDE_FILE:-}" ] || return 0
    list=$(sed 's/#.*//' "$EXCLUDE_FILE" | xargs | tr ' ' ,)
    [ -z "$list" ] || scontrol show hostnames "$list"
}

# The first allocation was made without knowing the list; later ones know it.
avoid_excluded() {
    local bad
    bad=$(comm -12 <(excluded_nodes | sort) <(printf '%s\n' "${NODES[@]}" | sort) | xargs)
    [ -z "$bad" ] || again 1 "$bad: in EXCLUDE_FILE $EXCLUDE_FILE"
}

# Before anything is launched. Never from the environment of whoever submitted: that machine is another one.
set_environment() {
    MASTER_ADDR=${NODES[0]}
    if ! getent hosts "$MASTER_ADDR" >/dev/null; then # not in the name service: Slurm has the address
        MASTER_ADDR=$(scontrol show node "$MASTER_ADDR" | grep -oP 'NodeAddr=\K\S+' || true)
        [ -n "$MASTER_ADDR" ] || again 1 "${NODES[0]}: neither the name service nor Slurm has its address"
    fi
    MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000)) # below the range from which systems give out ports
    # This script runs on the first node; another job may listen there.
    while (: <>"/dev/tcp/127.0.0.1/$MASTER_PORT") 2>/dev/null; do MASTER_PORT=$((MASTER_PORT + 1)); done
    export MASTER_ADDR MASTER_PORT NNODES=${#NODES[@]}
    export PYTHONPATH=$MEGATRON_MOA_DIR${PYTHONPATH:+:$PYTHONPATH} # the doctor's; an image has dependencies alone
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
    if [ -n "${SOCKET_IFNAME:-}" ]; then
        export NCCL_SOCKET_IFNAME=$SOCKET_IFNAME GLOO_SOCKET_IFNAME=$SOCKET_IFNAME
    fi
}

# step COMMAND…: once on every node
step() {
    rm -f "$LOGS"/*/exit_code
    [ -z "$STOPPED" ] || return 0
    local folder one folders=() mounts=''
    # RUN_DIR may lie elsewhere, and runs/ may be a link.
    for folder in "$PWD" "$MEGATRON_MOA_DIR" "$(cd "$RUN_DIR" && pwd)" "$(cd "$RUN_DIR" && pwd -P)"; do
        for one in "${folders[@]}"; do [[ $folder/ != "$one"/* ]] || continue 2; done
        folders+=("$folder") mounts+=$folder:$folder,
    done
    mounts=${mounts%,}${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}
    # When the first node has ended, what has not followed after five minutes never will.
    local srun=(srun --nodes="$NNODES" --ntasks="$NNODES" --ntasks-per-node=1 --wait=300)
    ((NNODES == 1)) || srun+=(--label)
    # srun does not take it from the job by itself.
    srun+=(${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"})
    case ${CONTAINER:-} in
    '') ;;
    *.sif) srun+=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "$CONTAINER") ;;
    *) srun+=(--container-image="$CONTAINER" --container-mounts="$mounts" --container-workdir="$PWD") ;;
    esac
    "${srun[@]}" python3 "$MEGATRON_MOA_DIR/examples/slurm/node.py" "$LOGS" "$@" &
    STEP=$!
    [ -z "$STOPPED" ] || pass_on USR2 "$STEP" # told to stop while there was no step yet
    # A signal interrupts the wait, after which its exit code means nothing; the nodes' files say how it ended.
    while kill -0 "$STEP" 2>/dev/null; do wait "$STEP" || true; done
}

# The nodes' exit codes, in their order; none for a node that was ended by srun, or is gone, or could not write it.
exit_codes() {
    local node code
    for node in "${NODES[@]}"; do
        code=$(cat "$LOGS/$node/exit_code" 2>/dev/null || true)
        echo "${code:-none}"
    done
}

# conclude: ends the job, or lets it go on later. docs/reliability.md has the exit codes.
conclude() {
    local codes index final='' failed=() failed_code='' lost='' stopped=''
    mapfile -t codes < <(exit_codes)
    for index in "${!NODES[@]}"; do
        case ${codes[$index]} in
        0) ;;
        2 | 17) final=${codes[$index]} ;;
        75) stopped=75 ;;
        76 | none) lost=76 ;;
        *) failed+=("${NODES[$index]}") failed_code=${codes[$index]} ;;
        esac
    done
    if [ -n "$final" ]; then
        say "exit code $final: another start would end the same way; see above, and $LOGS"
        exit "$final"
    fi
    local code=${failed_code:-${lost:-$stopped}} # who lost another says less than who failed
    [ -n "$code" ] || exit 0
    if [ "$STOPPED" = user ]; then
        say "stopped at iteration $(saved_iteration); the same sbatch line goes on from there"
        exit 75
    fi
    if [ ${#failed[@]} = 1 ] && [ ${#NODES[@]} -gt 1 ] && [ -n "${EXCLUDE_FILE:-}" ]; then
        say "${failed[0]} failed alone (exit code $code): added to EXCLUDE_FILE $EXCLUDE_FILE"
        echo "${failed[0]}" >>"$EXCLUDE_FILE"
    fi
    again "$code" "exit code $code at iteration $(saved_iteration)"
}

# again CODE WHY: requeues the job or submits its successor, if that is not in vain; ends this one
again() {
    local excluded options
    if [ "$(saved_iteration)" = "$BEGAN_AT" ] && ((STARTS >= MAX_STARTS)); then
        say "$2; $STARTS starts from iteration $BEGAN_AT and no new checkpoint: given up; the logs in $RUN_DIR/slurm say why"
        exit "$1"
    fi
    # With those that the job avoids already.
    excluded=$({ excluded_nodes; scontrol show job "$JOB" | sed -n 's/.*ExcNodeList=\([^( ][^ ]*\).*/\1/p'; } | sort -u | paste -sd ,)
    if [ "${CHAIN:-0}" = 1 ]; then
        read -ra options <<<"$SBATCH_ARGS"
        say "$2: goes on in a job that waits for the end of this one"
        CHAINED=1 sbatch "${options[@]}" --dependency="afterany:$SLURM_JOB_ID" ${excluded:+--exclude="$excluded"} \
            "$MEGATRON_MOA_DIR/examples/slurm/$SCRIPT" "${ARGUMENTS[@]}"
    else
        say "$2: requeued"
        trap '' TERM # which requeueing sends to this script
        scontrol requeue "$JOB"
        # Only a job that waits can be given another list.
        [ -z "$excluded" ] || scontrol update JobId="$JOB" ExcNodeList="$excluded"
    fi
    exit "$1"
}
