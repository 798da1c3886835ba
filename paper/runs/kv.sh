#!/usr/bin/env bash
# The published checkpoint's recipe, both stages, and what its vectors carry: ratios.sh and BIG-bench's functions.
#     METAICL_DIR=... C4_DIR=... SEEDS=100 LIMIT=8 paper/runs/kv.sh           BIGBENCH="" leaves BIG-bench out
source "$(dirname "$0")/settings.sh"
kv class_to_class
CHECKPOINT="$RUNS/kv-class_to_class" RESULTS="$RESULTS" paper/runs/ratios.sh
if [ -n "${BIGBENCH-bigbench}" ]; then
    "$PYTHON" evaluate.py --preset "$PRESET" --template newline --tasks bigbench --split functions --k 8 --distill-len 64 \
        --seeds $SEEDS --limit "$LIMIT" --methods zero_shot icl last_l icl_budget mend mend_swapped \
        --checkpoint "$RUNS/kv-class_to_class" --out "$RESULTS/bigbench-functions.jsonl" ${EXTRA:-} ${EXTRA_EVAL:-}
fi
