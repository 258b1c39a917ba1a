#!/usr/bin/env bash
# From a fresh machine to a model you can talk to.
#
#   bash speedrun.sh [--run NAME] [--data embedded|hub|PATH] [--depth N] [--device cuda|cpu|mps] [--max-minutes M] [--seed N]
#                    [--stages tokenizer,base,mid,sft,eval,report] [--no-tune] [--fresh] [--dry-run]
#
# Called again, it goes on where it stopped and does nothing twice. Every stage is one command that you can also give by
# hand; they are printed as they start. Artifacts: $NANOCHAT_BASE_DIR (default ~/.cache/nanochat-kernels).
set -euo pipefail

# A path after --data is meant from where the user stands.
ARGS=()
previous=""
for word in "$@"; do
    path="${word#--data=}"
    if [[ ("$previous" == --data || "$word" == --data=*) && "$path" != embedded && "$path" != hub && "$path" != /* ]]; then
        word="${word%"$path"}$PWD/$path"
    fi
    ARGS+=("$word")
    previous="$word"
done

cd "$(dirname "${BASH_SOURCE[0]}")"
# Told to stop, a stage saves and says so by its exit code. A signal may come to this shell alone, so it is handed on.
STOPPED=""
CHILD=""
tell() {
    STOPPED=1
    [ -z "$CHILD" ] || kill -"$1" "$CHILD" 2>/dev/null || true
}
trap 'tell INT' INT
trap 'tell TERM' TERM

# Runs a command as a child that a signal need not wait for; returns its exit code.
child() {
    [ -z "$STOPPED" ] || return 75
    local code=0 again=0
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

. scripts/venv.sh

PLAN=$(mktemp)
trap 'rm -f "$PLAN"' EXIT
child python -m scripts.plan ${ARGS[@]+"${ARGS[@]}"} --write "$PLAN"
[ -s "$PLAN" ] || exit 0 # --dry-run
. "$PLAN"

wanted() { [[ " ${STAGES[*]} " == *" $1 "* ]]; }

run() {
    echo
    echo "\$ ${*/#"$PWD/"/}"
    local code=0
    child "$@" || code=$?
    if [ $code -ne 0 ] && [ $code -ne 2 ] && [ $code -ne 75 ]; then # those have said what is to be said
        echo "This stage ended with code $code; the same command again goes on from its last checkpoint." >&2
    fi
    [ $code -eq 0 ] || exit $code
}

# Training on several GPUs: a rank each, started and ended together.
launch() {
    if [ "$GPUS" -gt 1 ]; then
        run python -m scripts.launch --gpus "$GPUS" "$1" -- "${@:2}"
    else
        run python -m "$@"
    fi
}

if wanted tokenizer; then
    run python -m scripts.tok_train --run="$RUN" "${TOKENIZER[@]}"
    run python -m scripts.tok_eval --run="$RUN" --data="$DATA"
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
if wanted eval; then
    run python -m scripts.base_eval --run="$RUN" --source=base --data="$DATA" --device-type="$DEVICE" --split-tokens=65536
    if [ "$CHAT_DATA" = embedded ]; then
        for stage in base mid sft; do
            [ ! -d "$RUN_DIR/$stage" ] ||
                run python -m scripts.chat_eval --run="$RUN" --source=$stage --device-type="$DEVICE" --max-new-tokens=32
        done
    fi
fi
if wanted report; then
    run python -m scripts.report --run="$RUN"
fi

if wanted report; then
    echo
    echo "Talk to it:  .venv/bin/python -m scripts.chat_cli --run=$RUN, or scripts.chat_web for a page"
fi
