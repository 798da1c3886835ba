"""Stage 1, meta-distillation pretraining (Sec. 3.2): the distiller learns Eq. (3) on text, the LLM stays frozen.

    python train_pretrain.py --beta 0.8
    python train_pretrain.py --preset pocket --corpus FOLDER --steps 2000 --resume
    python train_pretrain.py --objective clm --out-dir out/pretrain-clm      # HyperTuning; the ablations of App. B
    torchrun --nproc_per_node 8 train_pretrain.py --preset paper --batch-size 8

Each window of text is cut at beta: its first part is D, the rest x. At each evaluation the held-out KL stands next to
three references on the same windows: the LLM without any context, the LLM with the last l tokens of D (as many
positions as the vectors take), and the share of D's information that the vectors recover, 1 - KL / KL(no context).
"""

import argparse
import time
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import common
from common import autocast, check, finish, is_main, parse, run_main, setup, sum_over_ranks, world
from data import Corpus, collate, step_rows
from loading import build_distiller, distiller_config, load_llm, make_encoder, max_positions
from model import demo_prefix, loss_mask, query_states, vector_prefix
from run import Run, add_training_flags, finite, make_optimizer, sync_if, training_rules
from score import dev_figures, distill_loss, evaluate_kl, full_precision, pred_loss, pretrain_loss
from sources import Tokenizer, load_tasks

PRESETS = {  # the paper's Table 5, and what two CPU cores do in minutes
    "paper": {"steps": 30000, "batch_size": 1, "grad_accum": 1, "lr": 5e-5, "window": 1024, "context_len": 900,
              "eval_every": 2000, "patience": 5},
    "pocket": {"steps": 200, "batch_size": 8, "grad_accum": 1, "lr": 3e-4, "window": 256, "context_len": 450,
               "eval_every": 100, "patience": 5},
}


def get_parser() -> argparse.ArgumentParser:
    parser = common.make_parser(__doc__, "preset", "llm", "distiller", "distill-len", "tasks", "corpus", "k",
                                "template", "seed", "device", "dtype", "llm-weights")
    add_training_flags(parser, "pretrain-LLM")
    group = parser.add_argument_group("pretraining")
    group.add_argument("--window", type=int, help="tokens taken from each document")
    group.add_argument("--beta", type=float, default=0.8, help="share of a window that is D; the rest is x")
    group.add_argument("--objective", choices=("kl", "clm", "clm+kl"), default="kl",
                       help="kl: Eq. (3), MEND's; clm: negative log-likelihood of x, HyperTuning's; clm+kl: App. B")
    group.add_argument("--gamma", type=float, default=1.0, help="weight of Eq. (3) in --objective clm+kl")
    group.add_argument("--min-doc-len", type=int, default=64,
                       help="shortest document to use, in tokens; set it to --window for full windows only")
    group.add_argument("--eval-docs", type=int, default=64, help="held-out windows per evaluation")
    group.add_argument("--context-len", type=int, help="demonstration tokens when the tasks' dev data is looked at")
    return parser


def main(argv: list[str] | None = None) -> dict:
    args = parse(get_parser(), argv, PRESETS)
    check(*common.shared_rules(args), *training_rules(args),
          (0 < args.beta < 1, f"--beta is {args.beta}; give a share above 0 and below 1 (the paper: 0.8)"),
          (args.gamma > 0, f"--gamma is {args.gamma}; give a positive number"),
          (args.gamma == 1 or args.objective == "clm+kl", "--gamma only has a meaning with --objective clm+kl; add that"),
          (args.distiller != "free", ("--distiller free reads no text, so there is nothing to pretrain; go straight to "
                                     "train_finetune.py --distiller free --init-from none --lam 0")),
          *common.at_least(args, 8, "window", "min_doc_len"), *common.at_least(args, 1, "eval_docs", "context_len"))
    device = setup(args, training=True)
    llm = load_llm(args.llm, device, common.torch_dtype(args.dtype), args.llm_weights, args.grad_checkpoint)
    limit, tokenizer = max_positions(llm.config), Tokenizer(args.llm)
    bos, demo = tokenizer.bos_id is not None, round(args.beta * args.window)
    check((limit is None or args.window + bos <= limit,
           f"--window is {args.window}, and the LLM reads at most {limit} tokens; give less"),
          (limit is None or args.window - demo + args.distill_len + bos <= limit,
           (f"--distill-len is {args.distill_len}, which with {args.window - demo} tokens of x passes the {limit} tokens "
            "that the LLM reads; give less")))
    corpus = Corpus(args.corpus, tokenizer, args.window, args.min_doc_len)
    # early stopping looks at the Class->Class meta-test validation data (App. A), as dev_figures says
    tasks = load_tasks(args.tasks, "class_to_class", args.llm, args.k)
    distiller = build_distiller(args.distiller, llm, args.distill_len, args.vector_start, args.seed)
    limit = max_positions(distiller.backbone.config)
    check((limit is None or demo + args.distill_len <= limit,
           (f"--beta {args.beta} of --window {args.window} and --distill-len {args.distill_len} make "
            f"{demo + args.distill_len} tokens, and the distiller reads at most {limit}; give less")))
    return train(args, device, llm, distiller, corpus, tasks, make_encoder(args, tokenizer, llm, distiller))


def train(args, device, llm, distiller, corpus, tasks, encoder) -> dict:
    out_dir = Path(args.out_dir or common.OUT / f"pretrain-{Path(args.llm).name}")
    optimizer = make_optimizer(distiller, args.lr)
    scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "fp16")
    run = Run(out_dir, args, distiller, optimizer, scaler, distiller_config(distiller, llm, args),
                     {"pretrain": {"corpus": corpus.name, "hash": corpus.hash, "objective": args.objective,
                                   "gamma": args.gamma, "beta": args.beta}})
    uses_kl, uses_clm = args.objective != "clm", args.objective != "kl"
    rank, ranks = world()
    ddp = DistributedDataParallel(distiller) if ranks > 1 else distiller
    bos_id = encoder.tokenizer.bos_id
    rows_of = step_rows(lambda first, count: corpus.training_rows(args.seed, first, count, args.beta),
                        args.seed, args.batch_size * args.grad_accum)
    bar = tqdm(total=args.steps, initial=run.step, desc="pretrain", unit="step", disable=not is_main())
    distiller.train()
    while True:
        if run.evaluation_due(args.eval_every, args.steps):
            with full_precision(llm):
                figures = evaluate_kl(llm, distiller, corpus, args, device, bos_id)
                dev = dev_figures(llm, distiller, tasks, encoder, args, device)
            figures["val_option_ce"] = dev["val_option_ce"]
            figures |= {"dev_kl": dev["val_kl"], "dev_clm": dev["val_clm"]}
            run.evaluated(figures, figures["val_option_ce"])
            bar.write(f"step {run.step:6d} · held-out KL {figures['val_kl']:.4f} · no context "
                      f"{figures['val_kl_no_context']:.4f} · last {args.distill_len} tokens "
                      f"{figures['val_kl_last_l']:.4f} · recovered {figures['recovered']:.1%} · "
                      f"class_to_class dev option CE {dev['val_option_ce']:.4f} · KL {dev['val_kl']:.4f}"
                      + (f" · negative log-likelihood {figures['dev_clm']:.4f}" if uses_clm else ""))
        if run.done(args.steps, args.patience):
            break
        started = time.time()
        run.begin_step(args)
        rows = rows_of(run.step)
        n_tokens = sum(len(x) for row in rows for _, (x,) in row["queries"])
        totals = {name: 0.0 for name, used in (("kl", uses_kl), ("clm", uses_clm)) if used}
        for micro in range(args.grad_accum):
            batch = collate(rows[micro * args.batch_size:(micro + 1) * args.batch_size][rank::ranks], device)
            mask = loss_mask(llm, batch)
            if uses_kl:
                with torch.no_grad():
                    teacher = query_states(llm, demo_prefix(llm, batch["demo_ids"], batch["demo_mask"], bos_id), batch)
            with sync_if(ddp, micro == args.grad_accum - 1):
                with autocast(device, args.dtype):
                    vectors = ddp(batch["demo_ids"], batch["demo_mask"])                             # (B, l, d)
                student = query_states(llm, vector_prefix(llm, vectors, bos_id), batch)
                losses = {}
                if uses_kl:
                    losses["kl"] = distill_loss(llm, student[mask], teacher[mask], n_tokens)         # Eq. (3)
                if uses_clm:
                    losses["clm"] = pred_loss(llm, student[mask], batch["query_ids"][mask], n_tokens)
                loss = pretrain_loss(losses.get("clm", 0), losses.get("kl", 0), args.gamma)          # App. B
                scaler.scale(loss * ranks).backward()  # DDP averages over ranks; n_tokens counts those of all ranks
            for name, value in losses.items():
                totals[name] += value.item()
        totals = dict(zip(totals, sum_over_ranks(list(totals.values()), device), strict=True))
        finite(sum(totals.values()), run.step)
        grad_norm = run.update(args.clip)
        run.log(**totals, grad_norm=grad_norm, tokens=n_tokens, seconds=round(time.time() - started, 3))
        bar.set_postfix_str(", ".join(f"{name} {value:.3f}" for name, value in totals.items()))
        bar.update()
        if run.step % args.save_every == 0:
            run.save()
    bar.close()
    return finish({"stage": "pretrain", "steps": run.step, "best_option_ce": run.state["best"],
                   **run.state["figures"], "out_dir": str(out_dir), **common.peak_memory(device)})


if __name__ == "__main__":
    run_main(main)
