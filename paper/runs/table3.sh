#!/usr/bin/env bash
# Table 3: retrieved and perturbed demonstrations on Class->Class.
#     SCALE=pocket LIMIT=100 SEEDS="100 13" paper/runs/table3.sh
source "$(dirname "$0")/settings.sh"
split=class_to_class
for method in icl hypertuning mend; do
    flags=(--methods "$method")
    if [ "$method" != icl ]; then
        $method $split
        flags+=(--checkpoint "$RUNS/$method-$split")
    fi
    score table3 $split "${flags[@]}"
    for kind in ${RETRIEVALS-bm25 dense}; do score table3 $split "${flags[@]}" --retrieve "$kind"; done
    for kind in ${PERTURBATIONS-no_label no_input random_label wrong_label}; do
        score table3 $split "${flags[@]}" --perturb "$kind"
    done
done
table 3 table3
