"""Stage 2, meta-distillation finetuning (Sec. 3.2): the distiller learns Eq. (4) on the meta-training tasks.

    python train_finetune.py --split non_para_to_para
    python train_finetune.py --preset pocket --split class_to_class --tasks FOLDER --steps 1000 --resume
    python train_finetune.py --init-from out/pretrain-clm --lam 0                        # HyperTuning
    python train_finetune.py --distiller free --init-from none --lam 0                   # PromptTuning

A step draws tasks and, from each, K demonstrations and the queries that share them. The teacher reads the
demonstrations, the student their vectors; both then read the same queries.
"""

import argparse
import time
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import common
from common import autocast, check, finish, is_main, parse, run_main, setup, sum_over_ranks, world
from data import MAX_INPUT, collate, sample_row, step_rows
from loading import build_distiller, distiller_config, identity, load_distiller, load_llm, make_encoder
from model import demo_prefix, loss_mask, query_states, vector_prefix
from run import Run, add_training_flags, finite, load_checkpoint, make_optimizer, sync_if, training_rules
from score import dev_figures, distill_loss, finetune_loss, full_precision, pred_loss
from sources import Tokenizer, load_tasks

PRESETS = {  # the paper's Table 5, and what two CPU cores do in minutes
    "paper": {"steps": 30000, "batch_size": 8, "grad_accum": 1, "lr": 5e-5, "queries_per_demo": 1, "context_len": 900,
              "eval_every": 2000, "patience": 5},
    # DEVIATION: four queries share a demonstration set, which is read once for them; the paper has one.
    "pocket": {"steps": 200, "batch_size": 2, "grad_accum": 1, "lr": 3e-4, "queries_per_demo": 4, "context_len": 450,
               "eval_every": 100, "patience": 5},
}


def get_parser() -> argparse.ArgumentParser:
    parser = common.make_parser(__doc__, "preset", "llm", "distiller", "distill-len", "tasks", "split", "k",
                                "template", "seed", "device", "dtype", "llm-weights")
    add_training_flags(parser, "finetune-LLM-SPLIT")
    group = parser.add_argument_group("finetuning")
    group.add_argument("--lam", type=float, default=1.0, help="lambda, weight of L_distill in Eq. (4); 0 = without it")
    group.add_argument("--pred-weight", type=float, default=1.0, help="weight of L_pred in Eq. (4); 0 = without it (Tab. 4)")
    group.add_argument("--context-len", type=int, help="demonstration tokens at most; those that would pass it are dropped")
    group.add_argument("--queries-per-demo", type=int, help="queries that share one demonstration set; the paper: 1")
    group.add_argument("--init-from", metavar="DIR|none", help="pretraining run to start from; none = no pretraining; "
                       "default: the one with the lowest held-out KL under out/ that fits --llm and --distiller")
    return parser


def find_pretrained(llm, args) -> Path | None:
    """The pretraining checkpoint under out/ with the lowest held-out KL that has this LLM, distiller and l."""
    wanted = {"llm": identity(llm), "distiller": args.distiller, "distill_len": args.distill_len,
              "vector_start": args.vector_start, "template": args.template}
    found = []
    for path in sorted(common.OUT.glob("*/best.safetensors")):
        _, state = load_checkpoint(path, weights=False)
        stages = state["trained_on"]
        own = stages.keys() == {"pretrain"} and stages["pretrain"].get("objective", "kl") == "kl"  # the pretraining of MEND
        if own and wanted.items() <= state["model"].items():
            found.append((state["figures"]["val_kl"], path))
    return min(found)[1] if found else None


def start(args, llm):
    """The distiller to finetune, and what it was trained on so far."""
    source = args.init_from
    if source is None:
        source = find_pretrained(llm, args) or "none"
        if is_main():
            print(f"starting from the pretraining checkpoint {source}" if source != "none" else
                  "NO PRETRAINING CHECKPOINT for this LLM and distiller under out/: starting from the distiller's own "
                  "weights, which costs accuracy (Tab. 4). Run train_pretrain.py first, or give --init-from DIR.")
    if source == "none":
        return build_distiller(args.distiller, llm, args.distill_len, args.vector_start, args.seed), {}
    distiller, state = load_distiller(source, llm)
    check(*((state["model"][name] == getattr(args, name),
             (f"--init-from {source} has --{name.replace('_', '-')} {state['model'][name]}, and the flag is "
              f"{getattr(args, name)}; give the former")) for name in ("distiller", "distill_len", "vector_start", "template")),
          ("finetune" not in state["trained_on"],
           f"--init-from {source} is finetuned already; give a pretraining run, or --resume that run in its --out-dir"))
    return distiller, state["trained_on"]


def main(argv: list[str] | None = None) -> dict:
    args = parse(get_parser(), argv, PRESETS)
    check(*common.shared_rules(args), *training_rules(args),
          (args.lam >= 0, f"--lam is {args.lam}; give 0 (no distillation) or more"),
          (args.pred_weight >= 0, f"--pred-weight is {args.pred_weight}; give 0 (no prediction loss) or more"),
          (args.lam + args.pred_weight > 0, "--lam and --pred-weight are both 0, so there is no loss; give one of them"),
          (args.distiller != "free" or (args.init_from == "none" and args.lam == 0),
           "--distiller free is PromptTuning, without pretraining and L_distill; add --init-from none --lam 0"),
          *common.at_least(args, 1, "queries_per_demo"),
          (args.context_len >= MAX_INPUT, (f"--context-len is {args.context_len}; give at least {MAX_INPUT}, so that "
                                           "a demonstration of the longest input fits")))
    device = setup(args, training=True)
    tasks = load_tasks(args.tasks, args.split, args.llm, args.k)
    check((bool(tasks.train), f"--split {args.split} has no meta-training tasks; give another one"))
    if is_main():
        print(f"{args.split}: {len(tasks.train)} meta-training and {len(tasks.test)} meta-test tasks of "
              f"{tasks.collection} are here; reading them")
    need = args.k + args.queries_per_demo
    check(*((len(tasks.pool(t)) >= need, (f"task {t} has {len(tasks.pool(t))} different examples, and --k {args.k} with "
             f"--queries-per-demo {args.queries_per_demo} needs {need}")) for t in tasks.train))
    llm = load_llm(args.llm, device, common.torch_dtype(args.dtype), args.llm_weights, args.grad_checkpoint)
    distiller, trained_on = start(args, llm)
    encoder = make_encoder(args, Tokenizer(args.llm), llm, distiller)
    return train(args, device, llm, distiller, trained_on, tasks, encoder)


def train(args, device, llm, distiller, trained_on, tasks, encoder) -> dict:
    out_dir = Path(args.out_dir or common.OUT / f"finetune-{Path(args.llm).name}-{args.split}")
    optimizer = make_optimizer(distiller, args.lr)
    scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "fp16")
    run = Run(out_dir, args, distiller, optimizer, scaler, distiller_config(distiller, llm, args),
                     trained_on | {"finetune": {"tasks": tasks.collection, "split": args.split, "lam": args.lam,
                                                "pred_weight": args.pred_weight}})
    rank, ranks = world()
    ddp = DistributedDataParallel(distiller) if ranks > 1 else distiller
    bos_id = encoder.tokenizer.bos_id
    rows_of = step_rows(lambda first, count: [sample_row(tasks, encoder, args.seed, i, args.k, args.queries_per_demo)
                                              for i in range(first, first + count)],
                        args.seed, args.batch_size * args.grad_accum)
    bar = tqdm(total=args.steps, initial=run.step, desc="finetune", unit="step", disable=not is_main())
    distiller.train()
    while True:
        if run.evaluation_due(args.eval_every, args.steps):
            with full_precision(llm):
                figures = dev_figures(llm, distiller, tasks, encoder, args, device)
            run.evaluated(figures, figures["val_option_ce"])
            bar.write(f"step {run.step:6d} · dev option CE {figures['val_option_ce']:.4f} · answer loss "
                      f"{figures['val_pred']:.4f} · KL {figures['val_kl']:.4f} · headline "
                      f"{figures['dev_headline']:.2%}")
        if run.done(args.steps, args.patience):
            break
        started = time.time()
        run.begin_step(args)
        rows = rows_of(run.step)
        queries = [query for row in rows for query in row["queries"]]
        n_answers = sum(len(y) for _, (y,) in queries)
        n_tokens = n_answers + (0 if llm.config.is_encoder_decoder else sum(len(x) for x, _ in queries))  # of loss_mask
        totals = {name: 0.0 for name, weight in (("pred", args.pred_weight), ("kl", args.lam)) if weight}
        for micro in range(args.grad_accum):
            batch = collate(rows[micro * args.batch_size:(micro + 1) * args.batch_size][rank::ranks], device)
            mask, answers = loss_mask(llm, batch), batch["query_mask"] & (batch["branch"] > 0)
            if args.lam:
                with torch.no_grad():
                    teacher = query_states(llm, demo_prefix(llm, batch["demo_ids"], batch["demo_mask"], bos_id), batch)
            with sync_if(ddp, micro == args.grad_accum - 1):
                with autocast(device, args.dtype):
                    vectors = ddp(batch["demo_ids"], batch["demo_mask"])                             # (B, l, d)
                student = query_states(llm, vector_prefix(llm, vectors, bos_id), batch)
                losses = {}
                if args.pred_weight:
                    losses["pred"] = pred_loss(llm, student[answers], batch["query_ids"][answers], n_answers)
                if args.lam:
                    losses["kl"] = distill_loss(llm, student[mask], teacher[mask], n_tokens)         # Eq. (3)
                loss = finetune_loss(losses.get("pred", 0), losses.get("kl", 0), args.lam, args.pred_weight)  # Eq. (4)
                scaler.scale(loss * ranks).backward()  # DDP averages over ranks; the counts are those of all ranks
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
    return finish({"stage": "finetune", "split": args.split, "steps": run.step,
                   "best_option_ce": run.state["best"], **run.state["figures"], "out_dir": str(out_dir),
                   **common.peak_memory(device)})


if __name__ == "__main__":
    run_main(main)
