#!/usr/bin/env bash
# Table 2: all methods on the seven settings, five seeds; at the paper's scale for its three LLMs.
#     SCALE=pocket SPLITS="class_to_class" paper/runs/table2.sh
#     SCALE=paper LLMS=own paper/runs/table2.sh    # of the three gpt2-large alone
source "$(dirname "$0")/settings.sh"
if [[ $SCALE == paper && ${EXTRA:-} != *--llm* ]]; then
    LLMS=${LLMS:-own gpt2-xl google/t5-large-lm-adapt}
fi
for llm in ${LLMS:-own}; do  # own: the preset's, gpt2-large, or that of EXTRA
    (
        if [ "$llm" != own ]; then RUNS=$RUNS/$(basename "$llm") EXTRA="${EXTRA:-} --llm $llm"; fi
        if [[ $llm == google/t5* ]]; then EXTRA="$EXTRA --dtype fp32"; fi  # Table 5
        for split in ${SPLITS:-$SEVEN}; do
            score table2 "$split" --methods zero_shot majority icl icl_budget
            for method in prompt_tuning hypertuning mend; do
                $method "$split"
                score table2 "$split" --methods "$method" --checkpoint "$RUNS/$method-$split"
            done
        done
    )
done
table 2 table2
