#!/usr/bin/env bash
# Learning rates of finetuning: the same for every trained method, a short run each; best by dev option CE.
# Writes lr-SCALE.jsonl to RESULTS, a line a run, prints each method's best rate.
#     SCALE=pocket paper/runs/lr.sh
source "$(dirname "$0")/settings.sh"
split=class_to_class file="$RESULTS/lr-$SCALE.jsonl" short="--steps ${STEPS:-80} --eval-every ${STEPS:-80}"
pretrain pretrain-kl
pretrain pretrain-clm --objective clm
: > "$file.tmp"
try() {  # METHOD LR SCALE_FLAGS FLAG...
    finetune "$1-lr$2" $split "$3 $short" --lr "$2" "${@:4}" | tail -n 1 |
        sed "s/^{/{\"method\": \"$1\", \"lr\": $2, /" >> "$file.tmp"
}
for lr in ${RATES:-1e-4 1e-3 1e-2}; do
    try mend "$lr" "$MEND" --init-from "$RUNS/pretrain-kl"
    try hypertuning "$lr" "$HYPERTUNING" --init-from "$RUNS/pretrain-clm" --lam 0
    try prompt_tuning "$lr" "$PROMPT_TUNING" --distiller free --init-from none --lam 0
done
mv "$file.tmp" "$file"
"$PYTHON" - "$file" <<'END'
import json, sys
runs = [json.loads(line) for line in open(sys.argv[1])]
for method in dict.fromkeys(r["method"] for r in runs):
    best = min((r for r in runs if r["method"] == method), key=lambda r: r["best_option_ce"])
    print(f"{method}: {best['lr']:g} (dev option CE {best['best_option_ce']:.4f})")
END
