#!/usr/bin/env bash
# Table 1: tasks and average lengths of the seven settings, from the data.   SCALE=pocket METAICL_DIR=... paper/runs/table1.sh
source "$(dirname "$0")/settings.sh"
: > "$RESULTS/table1-$SCALE.jsonl"
for split in ${SPLITS:-$SEVEN}; do
    "$PYTHON" data.py --preset "$PRESET" ${DATA[@]+"${DATA[@]}"} --split "$split" ${EXTRA_DATA:-} | tail -n 1 >> "$RESULTS/table1-$SCALE.jsonl"
done
table 1 table1
