#!/usr/bin/env bash
# Fig. 3 and scaling: counts every method for the paper's LLMs, times gpt2-large here with random weights,
# draws both. Writes fig3.json to RESULTS, and fig3 and scaling as .png and .svg to RESULTS/figures.
source "$(dirname "$0")/settings.sh"
"$PYTHON" bench.py --fig3 --preset paper --out "$RESULTS/fig3.json" "$@"
for name in fig3 scaling; do
    "$PYTHON" -m paper.figures $name --results "$RESULTS/fig3.json" --out "$RESULTS/figures"
done
