#!/usr/bin/env bash
# Fig. 3 and scaling: counts every method for the paper's LLMs, times gpt2-large here with random weights, draws both.
# Writes results/fig3.json, and fig3 and scaling as .png and .svg to results/figures/.
source "$(dirname "$0")/settings.sh"
"$PYTHON" bench.py --fig3 --preset paper --out results/fig3.json "$@"
for name in fig3 scaling; do "$PYTHON" figures.py $name; done
