#!/usr/bin/env bash
# Every table, and every picture but the training curves, again from the lines in the repository's results/:
# no training, no data, one minute.
#     paper/runs/tables.sh
source "$(dirname "$0")/settings.sh"
RESULTS=results
for file in "$RESULTS"/table*.jsonl; do
    [[ $file =~ /table([0-9])-([a-z-]+)\.jsonl$ ]] || continue
    SCALE=${BASH_REMATCH[2]} table "${BASH_REMATCH[1]}" "table${BASH_REMATCH[1]}" > /dev/null
done
for name in method fig3 scaling fig4 fig8 ratios swaps; do "$PYTHON" -m paper.figures $name; done
