#!/usr/bin/env bash
# Table 1: tasks and average lengths of the seven settings, from the data.
#     SCALE=pocket METAICL_DIR=... paper/runs/table1.sh
source "$(dirname "$0")/settings.sh"
rows=$(mktemp); trap 'rm -f "$rows"' EXIT  # a failure leaves the old file
for split in ${SPLITS:-$SEVEN}; do
    "$PYTHON" data.py --preset "$PRESET" ${DATA[@]+"${DATA[@]}"} --split "$split" ${EXTRA_DATA:-} \
        | tail -n 1 >> "$rows"
done
cp "$rows" "$RESULTS/table1-$SCALE.jsonl.tmp"
mv "$RESULTS/table1-$SCALE.jsonl.tmp" "$RESULTS/table1-$SCALE.jsonl"
table 1 table1
