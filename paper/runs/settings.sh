# Scale and steps that the run scripts share; each of them sources this file. Everything is resumable: what is
# trained or evaluated already is not done again.
#
#   SCALE=paper  gpt2-large + gpt2, C4 and MetaICL from the hub, the paper's Table 5; the default where a GPU
#                is there
#   SCALE=pocket SmolLM2-135M-Instruct on two CPU cores; the default elsewhere
#   SCALE=pocket-gpu  the same at the paper's lengths (windows of 1,024, l = 100, D of up to 900 tokens), with
#                steps for minutes on one GPU; paper/runs/gpu.sh does all of it, side by side
# Optional, for any scale (relative paths count from the repository's root):
#   METAICL_DIR, C4_DIR  a folder in MetaICL's layout and a folder or file in C4's form, in place of the
#                        preset's data
#   SPLITS, SEEDS        settings and MetaICL seeds, separated by blanks
#   LIMIT                test examples per task; 0 = all
#   RESULTS, RUNS        where results and checkpoints go; another --llm needs another RUNS
#   EXTRA, EXTRA_TRAIN   any further flags of all commands but data.py, or of both trainings
#   EXTRA_PRETRAIN, EXTRA_FINETUNE, EXTRA_EVAL, EXTRA_DATA  or of one command
# and of single scripts: CHECKPOINT, LENGTHS, PARTS, SWAP_LENGTH (ratios, kv), RETRIEVALS, PERTURBATIONS
# (table3), BETAS, GAMMAS, LAMBDAS (ablations), LLMS (table2), PAIRS (table6), PARTS, KS, LENGTHS (fig4),
# RATES, STEPS (lr), KV_TASKS, BIGBENCH (kv).

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
SCALE=${SCALE:-$(command -v nvidia-smi > /dev/null && echo paper || echo pocket)}
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT-100}
SEEDS=${SEEDS:-100 13 21 42 87}
LIMIT=${LIMIT:-0}
RESULTS=${RESULTS:-results}
RUNS=${RUNS:-out/$SCALE}
SEVEN="class_to_class non_class_to_class non_nli_to_nli non_qa_to_qa qa_to_qa hr_to_lr non_para_to_para"
PRESET=$SCALE COMMON="" PRETRAIN="" MEND="" HYPERTUNING="" PROMPT_TUNING=""
KV="--distiller kv:32 --distill-len 64 --elastic --max-segments 4 --template newline"
KV="$KV --patience 0 --lr 1e-3"
KV_PRETRAIN="" KV_FINETUNE="--least-k 4 --queries-per-demo 4"
if [ "$SCALE" = pocket ]; then  # what was tried on dev data is in results/LOG.md
    PRETRAIN="--steps 300 --eval-every 150 --patience 0"
    MEND="--steps 300 --batch-size 4 --lr 1e-3 --eval-every 50 --patience 0"
    HYPERTUNING=$MEND PROMPT_TUNING=$MEND
    KV_PRETRAIN="--steps 120 --eval-every 120 --save-every 10"  # of the published checkpoint
    KV_FINETUNE="--least-k 4 --batch-size 8 --context-len 320 --steps 480 --eval-every 480 --eval-queries 1"
    KV_FINETUNE="$KV_FINETUNE --save-every 10"
elif [ "$SCALE" = pocket-gpu ]; then
    PRESET=pocket COMMON="--distill-len 100"
    PRETRAIN="--window 1024 --context-len 900 --batch-size 16 --steps 3000 --lr 5e-4 --eval-every 500"
    PRETRAIN="$PRETRAIN --patience 0 --save-every 250"
    MEND="--context-len 900 --batch-size 8 --steps 4000 --lr 1e-3 --eval-every 250 --patience 0"
    MEND="$MEND --save-every 250"
    HYPERTUNING=$MEND PROMPT_TUNING="$MEND --lr 1e-2"
    KV_PRETRAIN="--window 256 --context-len 900 --steps 2000 --eval-every 500"
    KV_FINETUNE="--least-k 4 --batch-size 16 --context-len 640 --steps 6000 --eval-every 1000"
    KV_FINETUNE="$KV_FINETUNE --eval-queries 2 --save-every 250"
elif [ "$SCALE" != paper ]; then
    echo "SCALE is $SCALE; give paper, pocket or pocket-gpu" >&2
    exit 2
fi
mkdir -p "$RESULTS"

DATA=()
if [ -n "${METAICL_DIR:-}" ]; then DATA=(--tasks "$METAICL_DIR"); fi
TEXT=()
if [ -n "${C4_DIR:-}" ]; then TEXT=(--corpus "$C4_DIR"); fi

# pretrain NAME FLAG...: stage 1 into $RUNS/NAME
pretrain() {
    "$PYTHON" train_pretrain.py --preset "$PRESET" ${DATA[@]+"${DATA[@]}"} ${TEXT[@]+"${TEXT[@]}"} \
        --out-dir "$RUNS/$1" --resume $COMMON $PRETRAIN \
        ${EXTRA:-} ${EXTRA_TRAIN:-} ${EXTRA_PRETRAIN:-} "${@:2}"
}

# finetune NAME SPLIT SCALE_FLAGS FLAG...: stage 2 into $RUNS/NAME-SPLIT
finetune() {
    "$PYTHON" train_finetune.py --preset "$PRESET" ${DATA[@]+"${DATA[@]}"} --split "$2" \
        --out-dir "$RUNS/$1-$2" --resume $COMMON $3 ${EXTRA:-} ${EXTRA_TRAIN:-} ${EXTRA_FINETUNE:-} "${@:4}"
}

# The three trained methods of Table 2, on one split. mend, hypertuning and prompt_tuning take SPLIT.
# DEVIATION: the paper searches lambda for each split; here it is 1 (EXTRA_FINETUNE="--lam 0.1", and a RUNS
# of its own; a run's last line has `best_option_ce`, by which to choose).
mend() { pretrain pretrain-kl; finetune mend "$1" "$MEND" --init-from "$RUNS/pretrain-kl"; }
hypertuning() {
    pretrain pretrain-clm --objective clm
    finetune hypertuning "$1" "$HYPERTUNING" --init-from "$RUNS/pretrain-clm" --lam 0
}
prompt_tuning() { finetune prompt_tuning "$1" "$PROMPT_TUNING" --distiller free --init-from none --lam 0; }
# The recipe of the published checkpoint: keys and values for every l up to 64, trained on tasks that need
# their demonstrations beside MetaICL's. Takes SPLIT.
kv() {
    PRETRAIN="$PRETRAIN $KV $KV_PRETRAIN --tasks functions" pretrain kv-pretrain
    finetune kv "$1" "$KV $KV_FINETUNE" --init-from "$RUNS/kv-pretrain" \
        --tasks ${KV_TASKS:-functions early recall} ${METAICL_DIR:+"$METAICL_DIR"}
}

# score FILE SPLIT FLAG...: evaluate into $RESULTS/FILE-$SCALE.jsonl
score() {
    "$PYTHON" evaluate.py --preset "$PRESET" ${DATA[@]+"${DATA[@]}"} --split "$2" --seeds $SEEDS \
        --limit "$LIMIT" --out "$RESULTS/$1-$SCALE.jsonl" $COMMON ${EXTRA:-} ${EXTRA_EVAL:-} "${@:3}"
}

# table NUMBER FILE: the paper's table, from $RESULTS/FILE-$SCALE.jsonl to the screen and to
# $RESULTS/tableNUMBER-$SCALE.md
table() {
    local file="$RESULTS/table$1-$SCALE.md"
    # a failure leaves the old one
    "$PYTHON" evaluate.py --table "$1" "$RESULTS/$2-$SCALE.jsonl" | sed '$d' > "$file.tmp"
    mv "$file.tmp" "$file"
    cat "$file"
}
