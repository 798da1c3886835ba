#!/usr/bin/env bash
# Fig. 3 and scaling: counts every method for the paper's LLMs, times gpt2-large here with random weights, draws both.
# Writes results/fig3.json, results/fig3.png, results/scaling.png and their .svg.
set -euo pipefail
cd "$(dirname "$0")/.."
python=python; [ -x .venv/bin/python ] && python=.venv/bin/python
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-100}"
"$python" bench.py --fig3 --preset paper --out results/fig3.json "$@"
"$python" figures_bench.py --results results/fig3.json --out-dir results
