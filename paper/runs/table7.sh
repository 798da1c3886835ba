#!/usr/bin/env bash
# Table 7: trained with the white-space template, evaluated with it and with the newline template.
#     SCALE=pocket paper/runs/table7.sh
source "$(dirname "$0")/settings.sh"
split=class_to_class
for template in space newline; do score table7 $split --template $template --methods icl; done
for method in hypertuning mend; do
    $method $split
    for template in space newline; do
        score table7 $split --template $template --methods $method --checkpoint "$RUNS/$method-$split"
    done
done
table 7 table7
