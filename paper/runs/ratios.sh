#!/usr/bin/env bash
# What the vectors carry: recovered gain over the ratio of tokens to vectors, on tasks that cannot be done
# without their demonstrations, and the swap matrix.
#     CHECKPOINT=out/pocket/kv-class_to_class LENGTHS="64 16" SEEDS=100 LIMIT=8 paper/runs/ratios.sh
source "$(dirname "$0")/settings.sh"
CHECKPOINT=${CHECKPOINT:-checkpoints/smollm2-135m.safetensors}
PARTS=${PARTS:-functions early recall swaps}
for part in $PARTS; do
    FLAGS="--template newline --checkpoint $CHECKPOINT $COMMON ${EXTRA:-} ${EXTRA_EVAL:-}"
    if [ "$part" = swaps ]; then
        "$PYTHON" -m paper.swaps --preset "$PRESET" --tasks functions $FLAGS \
            --distill-len "${SWAP_LENGTH:-32}" --out "$RESULTS/swaps.json"
        "$PYTHON" -m paper.figures swaps --results "$RESULTS/swaps.json" --out "$RESULTS/figures"
        continue
    fi
    methods="zero_shot icl icl_swapped"  # of which one l is enough
    for l in ${LENGTHS:-64 32 16 8}; do
        "$PYTHON" evaluate.py --preset "$PRESET" --tasks "$part" $FLAGS --distill-len "$l" --seeds $SEEDS \
            --limit "$LIMIT" --methods $methods last_l icl_budget mend mend_swapped mend_constant \
            --out "$RESULTS/ratios-$part.jsonl"
        methods=""
    done
done
made=("$RESULTS"/ratios-*.jsonl)
"$PYTHON" -m paper.figures ratios --results "${made[@]}" --out "$RESULTS/figures"
