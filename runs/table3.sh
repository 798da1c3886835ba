#!/usr/bin/env bash
# Table 3: retrieved and perturbed demonstrations on Class->Class.   SCALE=pocket LIMIT=100 SEEDS="100 13" runs/table3.sh
source "$(dirname "$0")/settings.sh"
split=class_to_class
for method in icl hypertuning mend; do
    flags=(--methods "$method")
    if [ "$method" != icl ]; then
        $method $split
        flags+=(--checkpoint "$RUNS/$method-$split")
    fi
    score table3 $split "${flags[@]}"
    for change in ${CHANGES:-"--retrieve bm25" "--retrieve dense" "--perturb no_label" "--perturb no_input" \
                             "--perturb random_label" "--perturb wrong_label"}; do
        score table3 $split "${flags[@]}" $change
    done
done
table 3 table3
