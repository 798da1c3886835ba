#!/usr/bin/env bash
# Figures 5 and 8: the LLM's induction heads, and where they look.
#     SCALE=pocket METAICL_DIR=... paper/runs/fig5.sh
source "$(dirname "$0")/settings.sh"
mend class_to_class
"$PYTHON" -m paper.attention --preset "$PRESET" ${DATA[@]+"${DATA[@]}"} \
    --checkpoint "$RUNS/mend-class_to_class" --out "$RESULTS" ${EXTRA:-}
"$PYTHON" -m paper.figures fig8 --results "$RESULTS/induction.json" --out "$RESULTS/figures"
"$PYTHON" -m paper.figures fig5 --results "$RESULTS/attention.json" --out "$RESULTS/figures"
