#!/usr/bin/env bash
# The published checkpoint's recipe, both stages, and what its vectors carry: ratios.sh and BIG-bench's
# functions.
#     METAICL_DIR=... C4_DIR=... SEEDS=100 LIMIT=8 paper/runs/kv.sh
# Some 85 minutes of training on two CPU cores with bf16 units, then evaluation, into out/kv-results.
# Optional:
#   CHECKPOINT     evaluate this one and train nothing, such as what gpu.sh has made
#   BIGBENCH=""    leaves BIG-bench out
export RESULTS=${RESULTS:-out/kv-results}
source "$(dirname "$0")/settings.sh"
if [ -z "${CHECKPOINT:-}" ]; then
    kv class_to_class
    export CHECKPOINT="$RUNS/kv-class_to_class"
fi
paper/runs/ratios.sh
if [ -n "${BIGBENCH-bigbench}" ]; then
    "$PYTHON" evaluate.py --preset "$PRESET" --template newline --tasks bigbench --split functions $COMMON \
        --k 8 --distill-len 64 --seeds $SEEDS --limit "$LIMIT" \
        --methods zero_shot icl last_l icl_budget mend mend_swapped \
        --checkpoint "$CHECKPOINT" --out "$RESULTS/bigbench-functions.jsonl" ${EXTRA:-} ${EXTRA_EVAL:-}
fi
