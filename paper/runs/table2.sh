#!/usr/bin/env bash
# Table 2: all methods on the seven settings, five seeds.
#     SCALE=pocket SPLITS="class_to_class" paper/runs/table2.sh
source "$(dirname "$0")/settings.sh"
for split in ${SPLITS:-$SEVEN}; do
    score table2 "$split" --methods zero_shot majority icl icl_budget
    for method in prompt_tuning hypertuning mend; do
        $method "$split"
        score table2 "$split" --methods "$method" --checkpoint "$RUNS/$method-$split"
    done
done
table 2 table2
