#!/usr/bin/env bash
# Table 4 and Figures 6 and 7: what pretraining, beta, gamma, lambda and either loss are worth.
#     paper/runs/ablations.sh
source "$(dirname "$0")/settings.sh"

# Table 4: four settings
pretrain pretrain-clm --objective clm
pretrain pretrain-clm+kl --objective clm+kl
for split in ${SPLITS:-non_class_to_class non_nli_to_nli non_qa_to_qa qa_to_qa}; do
    mend "$split"
    finetune no_pretraining "$split" "$MEND" --init-from none
    finetune clm "$split" "$MEND" --init-from "$RUNS/pretrain-clm"
    finetune clm+kl "$split" "$MEND" --init-from "$RUNS/pretrain-clm+kl"
    finetune without_pred "$split" "$MEND" --init-from "$RUNS/pretrain-kl" --pred-weight 0
    finetune without_distill "$split" "$MEND" --init-from "$RUNS/pretrain-kl" --lam 0
    score table4 "$split" --methods icl
    for variant in mend no_pretraining clm clm+kl without_pred without_distill; do
        score table4 "$split" --methods mend --checkpoint "$RUNS/$variant-$split"
    done
done
table 4 table4

# Figure 6, straight after pretraining: a beta, b gamma
for beta in ${BETAS:-0.1 0.5 0.8 0.9}; do
    name=pretrain-beta$beta
    [ "$beta" != 0.8 ] || name=pretrain-kl
    pretrain "$name" --beta "$beta"
    score fig6a class_to_class --methods mend --checkpoint "$RUNS/$name"
done
for gamma in ${GAMMAS:-0.01 0.1 1 10}; do
    name=pretrain-gamma$gamma
    [ "$gamma" != 1 ] || name=pretrain-clm+kl
    pretrain "$name" --objective clm+kl --gamma "$gamma"
    score fig6b class_to_class --methods mend --checkpoint "$RUNS/$name"
done

# Figure 7: lambda
pretrain pretrain-kl
for lam in ${LAMBDAS:-0.01 0.1 1 10}; do
    name=lam$lam
    [ "$lam" != 1 ] || name=mend
    finetune "$name" class_to_class "$MEND" --init-from "$RUNS/pretrain-kl" --lam "$lam"
    score fig7 class_to_class --methods mend --checkpoint "$RUNS/$name-class_to_class"
done
for figure in fig6 fig7; do
    "$PYTHON" -m paper.figures $figure --results "$RESULTS"/$figure*-"$SCALE".jsonl --out "$RESULTS/figures"
done
