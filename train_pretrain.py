"""Stage 1, meta-distillation pretraining (Sec. 3.2): the distiller learns Eq. (3) on text.

    python train_pretrain.py --beta 0.8
    python train_pretrain.py --preset pocket --corpus FOLDER --steps 2000 --resume
    python train_pretrain.py --objective clm --out-dir out/pretrain-clm      # HyperTuning; App. B's ablations
    torchrun --nproc_per_node 8 train_pretrain.py --preset paper --batch-size 8

Each window of text is cut at beta: its first part is D, the rest x. At each evaluation the held-out KL stands
next to three references on the same windows: the LLM without any context, the LLM with the last l tokens of D
(as many positions as the vectors take), and the share of D's information that the vectors recover, 1 - KL /
KL(no context). A text has no turns: with --template chat, too, it is read after the BOS alone.
"""

import argparse
from pathlib import Path

import common
from common import check, parse, run_main, setup
from data import Corpus, collate, step_rows
from loading import build_distiller, distiller_config, load_llm_of, max_positions, prepare
from model import loss_mask, teacher_and_student
from paper.held_out import dev_metrics, evaluate_kl, full_precision
from run import Run, add_training_flags, training_rules
from score import distill_loss, pred_loss, pretrain_loss
from sources.pairs import settle_distiller
from sources.tasks import tasks_of
from sources.text import Tokenizer

PRESETS = {  # the paper's Table 5, and what two CPU cores do in minutes
    "paper": {"steps": 30000, "batch_size": 1, "grad_accum": 1, "lr": 5e-5, "window": 1024,
              "context_len": 900, "eval_every": 2000, "patience": 5},
    "pocket": {"steps": 200, "batch_size": 8, "grad_accum": 1, "lr": 3e-4, "window": 256,
               "context_len": 450, "eval_every": 100, "patience": 5},
}


def get_parser() -> argparse.ArgumentParser:
    parser = common.make_parser(__doc__, "preset", "llm", "distiller", "distill-len", "tasks", "corpus", "k",
                                "template", *common.RUNNING)
    add_training_flags(parser, "pretrain-LLM")
    group = parser.add_argument_group("pretraining")
    group.add_argument("--window", type=int, help="tokens taken from each document")
    group.add_argument("--beta", type=float, default=0.8, help="share of a window that is D; the rest is x")
    group.add_argument("--objective", choices=("kl", "clm", "clm+kl"), default="kl",
                       help="kl: Eq. (3), MEND's; clm: negative log-likelihood of x, "
                            "HyperTuning's; clm+kl: App. B")
    group.add_argument("--gamma", type=float, default=1.0, help="weight of Eq. (3) in --objective clm+kl")
    group.add_argument("--min-doc-len", type=int, default=64,
                       help="shortest document to use, in tokens; set it to --window for full windows only")
    group.add_argument("--eval-docs", type=int, default=64, help="held-out windows per evaluation")
    group.add_argument("--context-len", type=int, help="demonstration tokens in front of the tasks' dev data")
    return parser


def main(argv: list[str] | None = None) -> dict:
    args = parse(get_parser(), argv, PRESETS)
    check(*common.shared_rules(args), *training_rules(args),
          (0 < args.beta < 1, f"--beta is {args.beta}; give a share above 0 and below 1 (the paper: 0.8)"),
          (0 < args.gamma < float("inf"), f"--gamma is {args.gamma}; give a positive number"),
          (args.gamma == 1 or args.objective == "clm+kl",
           "--gamma only has a meaning with --objective clm+kl; add that"),
          (args.distiller != "free",
           "--distiller free reads no text, so there is nothing to pretrain; go straight to "
           "train_finetune.py --distiller free --init-from none --lam 0"),
          *common.at_least(args, 8, "window", "min_doc_len"),
          *common.at_least(args, 1, "eval_docs", "context_len"))
    device = setup(args, training=True)
    settle_distiller(args)
    llm = load_llm_of(args, device)
    limit, tokenizer = max_positions(llm.config), Tokenizer(args.llm)
    bos, demo = len(tokenizer.bos), round(args.beta * args.window)
    check((limit is None or args.window + bos <= limit,
           f"--window is {args.window}, and the LLM reads at most {limit} tokens; give less"),
          (limit is None or args.window - demo + args.distill_len * args.max_segments + bos <= limit,
           f"--distill-len is {args.distill_len}, which in {args.max_segments} segments and with "
           f"{args.window - demo} tokens of x passes the {limit} tokens that the LLM reads; give less"))
    corpus = Corpus(args.corpus, tokenizer, args.window, args.min_doc_len)
    # early stopping looks at the Class->Class meta-test validation data (App. A), as dev_metrics says
    own_text = "tasks" in args.filled_in and "corpus" not in args.filled_in
    tasks = None if own_text else tasks_of(args, "class_to_class")
    if own_text:
        print("--corpus without --tasks: the best checkpoint is the one of the lowest held-out KL")
    distiller = build_distiller(args.distiller, llm, args.distill_len, args.vector_start, args.seed)
    limit = max_positions(distiller.backbone.config)
    check((limit is None or demo + args.distill_len <= limit,
           f"--beta {args.beta} of --window {args.window} and --distill-len {args.distill_len} make "
           f"{demo + args.distill_len} tokens, and the distiller reads at most {limit}; give less"))
    return train(args, device, llm, distiller, corpus, tasks, prepare(args, llm, distiller, device))


def train(args: argparse.Namespace, device, llm, distiller, corpus, tasks, formatter) -> dict:
    """The loop of stage 1, whose steps `Run` describes; returns the final metrics."""
    run = Run(f"pretrain-{Path(args.llm).name}", args, distiller, distiller_config(distiller, llm, args),
              {"pretrain": {"corpus": corpus.name, "hash": corpus.hash, "objective": args.objective,
                            "gamma": args.gamma, "beta": args.beta,
                            "dev_hash": tasks and tasks.dev_hash(args.seed)}})
    bos, uses_kl, uses_clm = formatter.tokenizer.bos, args.objective != "clm", args.objective != "kl"
    rows_of = step_rows(lambda first, count: corpus.training_rows(args.seed, first, count, args.beta),
                        args.seed, args.batch_size * args.grad_accum)
    while True:
        if run.evaluation_due():
            with full_precision(llm):
                metrics = evaluate_kl(llm, distiller, corpus, args, device, bos)
                metrics |= dev_metrics(llm, distiller, tasks, formatter, args, device) if tasks else {}
            run.evaluated(metrics, (
                f"held-out KL {metrics['heldout_kl']:.4f} · "
                f"no context {metrics['heldout_kl_no_context']:.4f} · "
                f"last {args.distill_len} tokens {metrics['heldout_kl_last_l']:.4f} · "
                f"recovered {metrics['recovered']:.1%}" + (
                    f" · class_to_class dev option CE {metrics['dev_option_ce']:.4f} · "
                    f"KL {metrics['dev_kl']:.4f}" if tasks else "")
                + (f" · negative log-likelihood {metrics['dev_clm']:.4f}" if tasks and uses_clm else "")))
        if run.done():
            return run.finish(stage="pretrain")
        run.begin_step()
        rows = rows_of(run.step)
        n_tokens = sum(len(x) for row in rows for _, (x,) in row["queries"])  # of all ranks' rows
        for part in run.micro_batches(rows):
            batch = collate(part, device, run.segments)
            teacher, student = teacher_and_student(llm, run.ddp, batch, bos, args.dtype, uses_kl)
            mask, losses = loss_mask(llm, batch), {}
            if uses_kl:
                losses["kl"] = distill_loss(llm, student[mask], teacher[mask], n_tokens)            # Eq. (3)
            if uses_clm:
                losses["clm"] = pred_loss(llm, student[mask], batch["query_ids"][mask], n_tokens)
            clm, kl = losses.get("clm", 0), losses.get("kl", 0)
            run.backward(pretrain_loss(clm, kl, args.gamma), **losses)                              # App. B
        run.end_step(n_tokens)


if __name__ == "__main__":
    run_main(main)
