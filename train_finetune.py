"""Stage 2, meta-distillation finetuning (Sec. 3.2): the distiller learns Eq. (4) on the meta-training tasks.

    python train_finetune.py --split non_para_to_para
    python train_finetune.py --preset pocket --split class_to_class --tasks FOLDER --steps 1000 --resume
    python train_finetune.py --init-from out/pretrain-clm --lam 0                        # HyperTuning
    python train_finetune.py --distiller free --init-from none --lam 0                   # PromptTuning

A step draws tasks and, from each, K demonstrations and the queries that share them. The teacher reads the
demonstrations, the student their vectors; both then read the same queries.
"""

import argparse
from pathlib import Path

import common
import loading
from common import check, parse, run_main, setup
from data import MAX_INPUT, collate, sample_row, step_rows
from loading import build_distiller, distiller_config, load_distiller, load_llm_of, prepare
from model import answer_mask, loss_mask, teacher_and_student
from paper.held_out import dev_metrics, full_precision
from run import Run, add_training_flags, training_rules
from score import distill_loss, finetune_loss, pred_loss
from sources.headers import is_pretraining, same_llm
from sources.pairs import settle_distiller
from sources.tasks import tasks_of

PRESETS = {  # the paper's Table 5, and what two CPU cores do in minutes
    "paper": {"steps": 30000, "batch_size": 8, "grad_accum": 1, "lr": 5e-5, "queries_per_demo": 1,
              "context_len": 900, "eval_every": 2000, "patience": 5},
    # DEVIATION: four queries share a demonstration set, which is read once for them; the paper has one.
    "pocket": {"steps": 200, "batch_size": 2, "grad_accum": 1, "lr": 3e-4, "queries_per_demo": 4,
               "context_len": 450, "eval_every": 100, "patience": 5},
}


def get_parser() -> argparse.ArgumentParser:
    parser = common.make_parser(__doc__, "preset", "llm", "distiller", "distill-len", "tasks", *common.OWN,
                                "k", "template", *common.RUNNING)
    add_training_flags(parser, "finetune-LLM-SPLIT")
    group = parser.add_argument_group("finetuning")
    group.add_argument("--lam", type=float, default=1.0, help="lambda, weight of L_distill in Eq. (4)")
    group.add_argument("--pred-weight", type=float, default=1.0,
                       help="weight of L_pred in Eq. (4); 0 = none (Tab. 4)")
    group.add_argument("--context-len", type=int, help="tokens of whole demonstrations at most")
    group.add_argument("--queries-per-demo", type=int, help="queries that share one set; the paper: 1")
    group.add_argument("--least-k", type=int, help="draw each set's K between this and --k; default: K is "
                       "--k, as in the paper")
    group.add_argument("--init-from", metavar="DIR|none",
                       help="pretraining run to start from; none = no pretraining; default: the one under "
                            "out/ that fits the flags and recovered most, of beta 0.8 if there is one")
    return parser


MADE_BY = ("distiller", "distill_len", "vector_start", "template")  # flags that a pretraining run settles


def find_pretrained(llm, args: argparse.Namespace) -> Path | None:
    """The pretraining checkpoint under out/ of this LLM and these flags that recovered most, of the paper's
    beta if there is one: a share, as the KLs of other texts, or of windows cut elsewhere, do not compare."""
    wanted, found = {name: getattr(args, name) for name in MADE_BY}, []
    for path in sorted(common.OUT.glob("*/best.safetensors")):
        with common.noting_faults():
            _, state = loading.load_checkpoint(path, weights=False)
            if is_pretraining(path, state) and same_llm(state["model"]["llm"], loading.identity(llm)) \
                    and wanted.items() <= state["model"].items():
                beta = state["trained_on"]["pretrain"].get("beta")
                found.append((beta != 0.8, -state["metrics"]["recovered"], path))
    return min(found)[-1] if found else None


def start(args: argparse.Namespace, llm):
    """The distiller to finetune, and what it was trained on so far."""
    source = args.init_from
    if source is None:
        source = find_pretrained(llm, args) or "none"
        print(f"starting from the pretraining checkpoint {source}" if source != "none" else
              "NO PRETRAINING CHECKPOINT for this LLM and distiller under out/: starting from the "
              "distiller's own weights, which costs accuracy (Tab. 4). Run train_pretrain.py first, or "
              "give --init-from DIR.")
    if source == "none":
        return build_distiller(args.distiller, llm, args.distill_len, args.vector_start, args.seed), {}
    distiller, state = load_distiller(source, llm)
    check(*((state["model"][name] == getattr(args, name),
             f"--init-from {source} has --{name.replace('_', '-')} {state['model'][name]}, and the flag is "
             f"{getattr(args, name)}; give the former") for name in MADE_BY),
          ("finetune" not in state["trained_on"],
           f"--init-from {source} is finetuned already; give a pretraining run, or --resume that run in its "
           "--out-dir"))
    return distiller, state["trained_on"]


def main(argv: list[str] | None = None) -> dict:
    args = parse(get_parser(), argv, PRESETS)
    check(*common.shared_rules(args), *training_rules(args), *common.finite(args, "lam", "pred_weight"),
          (args.lam + args.pred_weight > 0,
           "--lam and --pred-weight are both 0, so there is no loss; give one of them"),
          (args.distiller != "free" or (args.init_from, args.lam, args.max_segments) == ("none", 0, 1),
           "--distiller free is PromptTuning, without pretraining, L_distill and segments; "
           "add --init-from none --lam 0, leave --max-segments out"),
          *common.at_least(args, 1, "queries_per_demo", "least_k"),
          (not args.least_k or args.least_k <= args.k,
           f"--least-k is {args.least_k}, above --k {args.k}; give less"),
          (args.context_len >= MAX_INPUT, f"--context-len is {args.context_len}; give at least {MAX_INPUT}, "
                                          "so that a demonstration of the longest input fits"))
    device = setup(args, training=True)
    settle_distiller(args)
    tasks = tasks_of(args)
    check((bool(tasks.train), f"--split {args.split} has no meta-training tasks; give another one, or, of "
                              "your own tasks, --train-tasks"))
    print(f"{args.split}: {len(tasks.train)} meta-training and {len(tasks.test)} meta-test tasks of "
          f"{tasks.collection} are here; reading them")
    need = args.k + args.queries_per_demo
    check(*((tasks.size(t) >= need, f"task {t} has {tasks.size(t)} different examples, and --k {args.k} "
             f"with --queries-per-demo {args.queries_per_demo} needs {need}") for t in tasks.train))
    llm = load_llm_of(args, device)
    distiller, trained_on = start(args, llm)
    return train(args, device, llm, distiller, trained_on, tasks, prepare(args, llm, distiller, device))


def train(args: argparse.Namespace, device, llm, distiller, trained_on, tasks, formatter) -> dict:
    """The loop of stage 2, whose steps `Run` describes; returns the final metrics."""
    stage = {"tasks": tasks.collection, "split": args.split, "lam": args.lam, "pred_weight": args.pred_weight,
             "hash": tasks.training_hash(), "dev_hash": tasks.dev_hash(args.seed), **tasks.record()}
    run = Run(f"finetune-{Path(args.llm).name}-{args.split}", args, distiller,
              distiller_config(distiller, llm, args), trained_on | {"finetune": stage})

    def draw(first: int, count: int) -> list[dict]:
        return [sample_row(tasks, formatter, args.seed, i, args.k, args.queries_per_demo, args.least_k)
                for i in range(first, first + count)]

    rows_of = step_rows(draw, args.seed, args.batch_size * args.grad_accum)
    while True:
        if run.evaluation_due():
            with full_precision(llm):
                metrics = dev_metrics(llm, distiller, tasks, formatter, args, device)
            run.evaluated(metrics, (
                f"dev option CE {metrics['dev_option_ce']:.4f} · answer loss {metrics['dev_pred']:.4f} · "
                f"KL {metrics['dev_kl']:.4f} · headline {metrics['dev_headline']:.2%}"))
        if run.done():
            return run.finish(stage="finetune", split=args.split)
        run.begin_step()
        rows = rows_of(run.step)
        queries = [query for row in rows for query in row["queries"]]
        n_answers, n_x = sum(len(y) for _, (y,) in queries), sum(len(x) for x, _ in queries)  # of all ranks
        n_tokens = n_answers + (0 if llm.config.is_encoder_decoder else n_x)  # as loss_mask has it
        for part in run.micro_batches(rows):
            batch = collate(part, device, run.segments)
            teacher, student = teacher_and_student(llm, run.ddp, batch, formatter.turns.head, args.dtype,
                                                   with_teacher=args.lam > 0)
            mask, answers, losses = loss_mask(llm, batch), answer_mask(batch), {}
            if args.pred_weight:
                losses["pred"] = pred_loss(llm, student[answers], batch["query_ids"][answers], n_answers)
            if args.lam:
                losses["kl"] = distill_loss(llm, student[mask], teacher[mask], n_tokens)            # Eq. (3)
            pred, kl = losses.get("pred", 0), losses.get("kl", 0)
            run.backward(finetune_loss(pred, kl, args.lam, args.pred_weight), **losses)             # Eq. (4)
        run.end_step(n_tokens)


if __name__ == "__main__":
    run_main(main)
