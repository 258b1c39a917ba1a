#!/usr/bin/env bash
# From a fresh machine to a model you can talk to.
#
#   bash speedrun.sh [--run NAME] [--data embedded|hub|PATH] [--depth N] [--device cuda|cpu|mps] [--max-minutes M] [--seed N]
#                    [--stages tokenizer,base,mid,sft,rl,eval,report] [--no-tune] [--fresh] [--dry-run]
#
# Called again, it goes on where it stopped and does nothing twice. Every stage is one command that you can also give by
# hand; they are printed as they start. Artifacts: $NANOCHAT_BASE_DIR (default ~/.cache/nanochat-kernels).
# On several machines that share that folder each runs it once, as scripts/slurm.sh shows.
set -euo pipefail

wrong() { echo "error: $*" >&2; exit 2; }

# A path after --data or in the environment is meant from where the user stands.
ARGS=()
previous=""
for word in "$@"; do
    path="${word#--data=}"
    [[ -n "$path" || ("$previous" != --data && -z "$word") ]] ||
        wrong "--data is empty, wanted embedded, hub or a path to your own (a variable that is not set?)"
    if [[ ("$previous" == --data || "$word" == --data=*) && "$path" != embedded && "$path" != hub && "$path" != /* && "$path" != '~/'* ]]; then
        word="${word%"$path"}$PWD/$path"
    fi
    ARGS+=("$word")
    previous="$word"
done
for name in NANOCHAT_BASE_DIR NANOCHAT_HUB_ROOT NANOCHAT_PYTHON TMPDIR; do # Python's may be a name, found by PATH
    path="${!name:-/}"
    [[ "$path" == [/~]* || "$path" == [A-Za-z]:* || ("$name" == NANOCHAT_PYTHON && "$path" != */*) ]] || export "$name=$PWD/$path"
done

CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
# Told to stop, a stage saves and says so by its exit code. A signal may come to this shell alone, so it is handed on.
STOPPED=""
CHILD=""
tell() {
    STOPPED=1
    [ -z "$CHILD" ] || kill -"$1" "$CHILD" 2>/dev/null || true
}
trap 'tell INT' INT
trap 'tell TERM' TERM HUP # nohup's child never gets here

# Runs a command as a child that a signal need not wait for; returns its exit code.
child() {
    [ -z "$STOPPED" ] || return 75
    local code=0 again=0
    [ "$1" != python ] || [ -z "${NANOCHAT_PYTHON:-}" ] || set -- "$NANOCHAT_PYTHON" "${@:2}" # the process, not a shell
    "$@" &
    CHILD=$!
    while true; do # a signal ends `wait`, not the child
        code=0
        wait "$CHILD" || code=$?
        kill -0 "$CHILD" 2>/dev/null || break
    done
    if [ $code -gt 128 ]; then # of the signal, or of the child, which may have ended just then
        wait "$CHILD" 2>/dev/null || again=$?
        [ $again -eq 127 ] || code=$again
    fi
    CHILD=""
    return $code
}

# Several machines: Slurm (srun) or torchrun's variables say how many there are and which of them this is. The first one
# plans, and takes the stages of a single process; the others wait for it where the next training begins.
SET=(SLURM_STEP_NUM_NODES SLURM_JOB_NUM_NODES SLURM_STEP_NUM_TASKS WORLD_SIZE LOCAL_WORLD_SIZE SLURM_NODEID RANK MASTER_PORT)
for name in "${SET[@]}"; do
    [[ "${!name:-1}" =~ ^(0|[1-9][0-9]{0,8})$ && ("$name" == *NODEID || "$name" == RANK || "${!name:-1}" != 0) ]] ||
        wrong "$name is '${!name}', wanted a whole number; a launcher sets it (srun, torchrun); for one machine: unset $name"
done
NODES=${SLURM_STEP_NUM_NODES:-${WORLD_SIZE:-1}}
NODE=0 HEAD=${MASTER_ADDR:-} PORT=${MASTER_PORT:-29500}
if [ "$NODES" -eq 1 ] && [ -z "${SLURM_STEP_NUM_NODES:-}" ] && [ "${SLURM_JOB_NUM_NODES:-1}" -gt 1 ]; then
    echo "note: this job has $SLURM_JOB_NUM_NODES machines, and only this one trains; scripts/slurm.sh starts all (srun)" >&2
fi
if [ "$NODES" -gt 1 ]; then
    NODE=${SLURM_NODEID:-${RANK:-0}} PORT=$((PORT + 1)) # torchrun's own may still be in use
    [ "$NODE" -lt "$NODES" ] || wrong "this is machine $NODE (from 0) of $NODES by RANK or SLURM_NODEID; give each its own"
    [ "$PORT" -le 65500 ] || wrong "MASTER_PORT is $MASTER_PORT, wanted at most 65499"
    [ -n "$HEAD" ] || wrong "$NODES machines, but MASTER_ADDR does not name the first of them (scripts/slurm.sh sets it)"
    [ "${SLURM_STEP_NUM_TASKS:-$NODES}" -eq "$NODES" ] && [ "${LOCAL_WORLD_SIZE:-1}" -eq 1 ] ||
        wrong "speedrun.sh is started once on each machine, and starts a rank for each GPU itself (srun --ntasks-per-node=1)"
fi
unset RANK LOCAL_RANK WORLD_SIZE # they are not those of what we start
unset PYTHONSAFEPATH # python -m is to find what is in this folder

. scripts/venv.sh

PLAN=$(mktemp 2>/dev/null || TMPDIR=/tmp mktemp 2>/dev/null) ||
    wrong "no file can be made in ${TMPDIR:-/tmp}; set TMPDIR to a folder with space that may be written to"
trap 'rm -f "$PLAN"' EXIT
TOGETHER=()
[ "$NODES" -eq 1 ] || TOGETHER=(--nodes="$NODES" --node="$NODE" --head="$HEAD:$PORT")
child python -m scripts.plan ${ARGS[@]+"${ARGS[@]}"} ${TOGETHER[@]+"${TOGETHER[@]}"} --write "$PLAN"
[ -s "$PLAN" ] || exit 0 # --dry-run
. "$PLAN"

wanted() { [[ " ${STAGES[*]} " == *" $1 "* ]]; }

# Runs a command, shown; returns its exit code.
try() {
    echo
    echo "\$ ${*/#"$PWD/"/}"
    local code=0
    child "$@" || code=$?
    if [ $code -ne 0 ] && [ $code -ne 2 ] && [ $code -ne 75 ]; then # those have said what is to be said
        local again="the same command again"
        [[ " $* " != *" --fresh "* ]] || again="the same command without --fresh"
        echo "This stage ended with code $code; $again goes on from its last checkpoint." >&2
    fi
    return $code
}

run() { try "$@" || exit $?; }

# What one process does, on the first machine.
alone() { [ "$NODE" -ne 0 ] || run "$@"; }

# An evaluation that fails leaves the others and the report; its code ends the run.
FAILED=0
evaluate() {
    [ "$NODE" -eq 0 ] || return 0
    local code=0
    try "$@" || code=$?
    [ $code -ne 75 ] || exit $code
    [ $code -eq 0 ] || FAILED=$code
}

# Training on several GPUs: a rank each, started and ended together; on several machines by torchrun, which waits up to
# two hours for the first machine to get here, and ten minutes for ranks that are told to stop and save.
launch() {
    if [ "$NODES" -gt 1 ]; then
        PORT=$((PORT + 1)) # each its own: the one before may still be ending elsewhere
        run python -m torch.distributed.run --nnodes="$NODES" --node-rank="$NODE" --nproc-per-node="$GPUS" \
            --master-addr="$HEAD" --master-port="$PORT" --rdzv-conf=timeout=7200 --shutdown-timeout=600 \
            -m "$1" -- "${@:2}"
    elif [ "$GPUS" -gt 1 ]; then
        run python -m scripts.launch --gpus "$GPUS" "$1" -- "${@:2}"
    else
        run python -m "$@"
    fi
}

if wanted tokenizer; then
    alone python -m scripts.tok_train --run="$RUN" "${TOKENIZER[@]}"
    alone python -m scripts.tok_eval --run="$RUN" --data="$DATA"
fi
if wanted base; then
    launch scripts.base_train --run="$RUN" "${BASE[@]}"
fi
if wanted mid; then
    launch scripts.mid_train --run="$RUN" "${MID[@]}"
fi
if wanted sft; then
    launch scripts.chat_sft --run="$RUN" "${SFT[@]}"
fi
if wanted rl; then
    launch scripts.chat_rl --run="$RUN" "${RL[@]}"
fi
if wanted eval; then
    evaluate python -m scripts.base_eval --run="$RUN" --source=base --data="$DATA" --device-type="$DEVICE" --eval=bpb,sample --split-tokens=65536
    if [ ${#CORE[@]} -gt 0 ]; then
        evaluate python -m scripts.base_eval --run="$RUN" --source=base --device-type="$DEVICE" "${CORE[@]}"
    fi
    for stage in base mid sft rl; do
        if [ ${#CHAT[@]} -gt 0 ] && [ -d "$RUN_DIR/$stage" ]; then
            evaluate python -m scripts.chat_eval --run="$RUN" --source=$stage --device-type="$DEVICE" "${CHAT[@]}"
        fi
    done
fi
if wanted report; then
    alone python -m scripts.report --run="$RUN"
fi

if wanted report && [ "$NODE" -eq 0 ]; then
    echo
    echo "Talk to it:  .venv/bin/python -m scripts.chat_cli --run=$RUN, or scripts.chat_web for a page"
fi
exit $FAILED
