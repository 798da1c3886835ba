#!/usr/bin/env bash
# Table 6: larger LLMs on Class->Class; their weights come from the hub. opt-6.7b takes 27 GB in fp32, 13 in
# bf16 and 7 in 8 bit, flan-t5-xl 11, 6 and 3; training adds the distiller and activations.
#     paper/runs/table6.sh
source "$(dirname "$0")/settings.sh"
for pair in ${PAIRS:-facebook/opt-6.7b,facebook/opt-125m google/flan-t5-xl,google/flan-t5-base}; do
    llm=${pair%,*} distiller=${pair#*,}
    (
        RUNS=$RUNS/$(basename "$llm")
        EXTRA="${EXTRA:-} --llm $llm"
        score table6 class_to_class --methods icl
        for method in hypertuning mend; do
            EXTRA_TRAIN="${EXTRA_TRAIN:-} --distiller $distiller" $method class_to_class
            score table6 class_to_class --methods "$method" --checkpoint "$RUNS/$method-class_to_class"
        done
        prompt_tuning class_to_class
        score table6 class_to_class --methods prompt_tuning --checkpoint "$RUNS/prompt_tuning-class_to_class"
    )
done
table 6 table6
