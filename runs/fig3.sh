#!/usr/bin/env bash
# Fig. 3 and scaling: counts every method for the paper's LLMs, times gpt2-large here with random weights, draws both.
# Writes results/fig3.json, results/fig3.png, results/scaling.png and their .svg.
source "$(dirname "$0")/settings.sh"
"$PYTHON" bench.py --fig3 --preset paper --out results/fig3.json "$@"
"$PYTHON" figures_bench.py --results results/fig3.json --out-dir results
