#!/usr/bin/env bash
# Figure 4: a, K demonstrations at fixed l; b, l vectors at K = 16, retrained for each l.
#     SCALE=pocket PARTS=a paper/runs/fig4.sh
source "$(dirname "$0")/settings.sh"
split=class_to_class
if [[ "${PARTS:-ab}" == *a* ]]; then
    hypertuning $split
    mend $split
    for k in ${KS:-1 2 4 8 16}; do
        score fig4a $split --k "$k" --methods icl
        for method in hypertuning mend; do
            score fig4a $split --k "$k" --methods $method --checkpoint "$RUNS/$method-$split"
        done
    done
fi
if [[ "${PARTS:-ab}" == *b* ]]; then
    for l in ${LENGTHS:-1 10 50 100 200}; do
        (
            RUNS=$RUNS/l$l
            # after whatever else is given, as the last one counts
            EXTRA_TRAIN="${EXTRA_TRAIN:-} --distill-len $l" EXTRA_EVAL="${EXTRA_EVAL:-} --distill-len $l"
            for method in prompt_tuning hypertuning mend; do
                $method $split
                score fig4b $split --methods $method --checkpoint "$RUNS/$method-$split"
            done
        )
    done
fi
"$PYTHON" -m paper.figures fig4 --results "$RESULTS"/fig4*-"$SCALE".jsonl --out "$RESULTS/figures"
