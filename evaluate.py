"""Evaluation on the meta-test tasks (Sec. 4): demonstrations or vectors are read once, then every query and option.

    python evaluate.py --split class_to_class --methods zero_shot icl icl_budget mend --checkpoint out/finetune-LLM
    python evaluate.py --tasks FOLDER --methods icl mend --checkpoint DIR --seeds 13 21 --limit 100 --out results.jsonl

The label is the argmax over a query's options of the mean token log-likelihood, Eq. (1) for demonstrations and Eq. (2)
for vectors. One line of --out holds one (method, task, seed); a run that was stopped goes on where it was.
"""

import argparse
import json
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import common
from common import UserError, autocast, check, finish, parse, run_main, setup, sum_over_ranks, world
from data import SEEDS, Encoder, Tasks, Tokenizer, collate, load_tasks, require_options
from model import (
    Prefix,
    demo_prefix,
    distill_loss,
    load_distiller,
    load_llm,
    loss_mask,
    max_positions,
    pred_loss,
    query_states,
    score_options,
    vector_prefix,
)

PRESETS = {"paper": {"methods": ["zero_shot", "icl", "icl_budget", "mend"]},
           "pocket": {"methods": ["zero_shot", "icl", "icl_budget", "mend"]}}
PASS_TOKENS = 512  # query and option tokens scored in one pass

# ---------------------------------------------------------------------------------------------------------------------
# Methods: what stands before the query


def make_encoder(args: argparse.Namespace, tokenizer: Tokenizer, llm, distiller) -> Encoder:
    """The encoder of examples with the length limits of this LLM and distiller (None where no vectors are made)."""
    return Encoder(tokenizer, args.template, args.context_len, args.distill_len, max_positions(llm.config),
                   None if distiller is None else max_positions(distiller.backbone.config))


def make_prefix(method: str, demos: list[dict], limit: int, llm, distiller, encoder: Encoder, args) -> Prefix:
    """What the LLM reads in place of the demonstrations under one method, read once, B = 1.

    zero_shot: nothing. icl: all of D (Eq. 1). icl_budget: the demonstrations that fit into l tokens, the honest
    baseline of equal length. mend: the distilled vectors (Eq. 2).
    """
    bos_id = encoder.tokenizer.bos_id
    ids = {"zero_shot": list, "icl_budget": lambda: encoder.budget(demos, args.distill_len),
           "icl": lambda: encoder.demonstrations(demos, limit), "mend": lambda: encoder.demonstrations(demos, limit)}
    demo_ids = torch.tensor([ids[method]()], dtype=torch.long, device=llm.device)                    # (1, T_d)
    demo_mask = torch.ones_like(demo_ids, dtype=torch.bool)
    if method == "mend":
        with autocast(llm.device, args.dtype):
            return vector_prefix(llm, distiller(demo_ids, demo_mask), bos_id)
    return demo_prefix(llm, demo_ids, demo_mask, bos_id)


METHODS = ("zero_shot", "icl", "icl_budget", "mend")


# ---------------------------------------------------------------------------------------------------------------------
# Scoring and metrics


def passes(queries: list[tuple], device) -> Iterator[dict]:
    """Batches of one row that hold `queries`, (x ids, [option ids, ...]) each, in order, PASS_TOKENS or so at a time."""
    pending, size = [], 0
    for query in queries:
        tokens = len(query[0]) + sum(map(len, query[1]))
        if pending and size + tokens > PASS_TOKENS:
            yield collate([{"demo": [], "queries": pending}], device)
            pending, size = [], 0
        pending.append(query)
        size += tokens
    if pending:
        yield collate([{"demo": [], "queries": pending}], device)


@torch.no_grad()
def predict(llm, prefix: Prefix, encoder: Encoder, queries: list[dict], first: bool = False) -> list[str]:
    """The chosen option of each query, Eq. (1) and (2); all queries are read behind one prefix of B = 1.

    first: no demonstrations or vectors stand before the queries (zero_shot).

    DEVIATION: Eq. (1) takes the labels seen among the demonstrations; MetaICL and the original code score the task's
    whole option list, and so does this.
    """
    encoded = [encoder.scoring_query(q, first=first) for q in queries]
    chosen = [c for batch in passes(encoded, llm.device)
              for c in score_options(llm, prefix, batch)[0].argmax(dim=1).tolist()]
    return [q["options"][c] for q, c in zip(queries, chosen, strict=True)]


def accuracy(predictions: list[str], golds: list[str]) -> float:
    return float(np.mean([p == g for p, g in zip(predictions, golds, strict=True)]))


def macro_f1(predictions: list[str], golds: list[str]) -> float:
    """F1 averaged over the labels that occur among the gold answers, as in MetaICL."""
    scores = []
    for label in sorted(set(golds)):
        hits = sum(p == g == label for p, g in zip(predictions, golds, strict=True))
        scores.append(2 * hits / (predictions.count(label) + golds.count(label)))
    return float(np.mean(scores))


def task_figures(predictions: list[str], golds: list[str], task_type: str) -> dict:
    """Both metrics and the headline.

    DEVIATION: the paper's text says accuracy for classification and macro-F1 otherwise; its zero-shot figures equal
    MetaICL's, which are macro-F1 for classification and accuracy otherwise. The headline follows the figures.
    """
    f1, acc = macro_f1(predictions, golds), accuracy(predictions, golds)
    return {"macro_f1": f1, "accuracy": acc, "headline": f1 if task_type == "classification" else acc}


@torch.no_grad()
def dev_figures(llm, distiller, tasks: Tasks, encoder: Encoder, args, device) -> dict:
    """Both terms of Eq. (4) and the headline on the meta-test tasks' dev examples, tasks shared out over the ranks.

    Returns:
        val_pred (nats per answer token), val_kl (nats per query and answer token), dev_headline (mean over tasks).
    """
    rank, ranks = world()
    seed = args.seed if args.seed in SEEDS else SEEDS[0]
    sums = dict.fromkeys(("pred", "answers", "kl", "tokens", "headline", "tasks"), 0.0)
    distiller.eval()
    for task in tasks.test[rank::ranks]:
        files = tasks.files(task, seed)
        demos, queries = files["train"][:args.k], files["dev"]
        require_options(queries)
        limit = encoder.limit(demos + queries)
        teacher_prefix = make_prefix("icl", demos, limit, llm, distiller, encoder, args)
        student_prefix = make_prefix("mend", demos, limit, llm, distiller, encoder, args)
        for batch in passes([encoder.training_query(q) for q in queries], device):
            student, teacher = query_states(llm, student_prefix, batch), query_states(llm, teacher_prefix, batch)
            mask, answers = loss_mask(llm, batch), batch["query_mask"] & (batch["branch"] > 0)
            sums["kl"] += distill_loss(llm, student[mask], teacher[mask], 1).item()
            sums["pred"] += pred_loss(llm, student[answers], batch["query_ids"][answers], 1).item()
            sums["tokens"] += int(mask.sum())
            sums["answers"] += int(answers.sum())
        chosen = predict(llm, student_prefix, encoder, queries)
        sums["headline"] += task_figures(chosen, [q["output"] for q in queries], tasks.types[task])["headline"]
        sums["tasks"] += 1
    distiller.train()
    pred, answers, kl, tokens, headline, n_tasks = sum_over_ranks(list(sums.values()), device)
    return {"val_pred": pred / answers, "val_kl": kl / tokens, "dev_headline": headline / n_tasks}


# ---------------------------------------------------------------------------------------------------------------------
# Results


def read_results(path: Path) -> list[dict]:
    """The lines of a results file; a last line that a kill cut short is dropped from the file."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    if lines[-1]:
        path.write_text("".join(f"{line}\n" for line in lines[:-1]))
    try:
        return [json.loads(line) for line in lines[:-1]]
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not a results file of evaluate.py ({error}); give another --out") from error


def summarise(records: list[dict], methods: list[str]) -> dict:
    """Per task and on average: mean and standard deviation over seeds of the headline, in percent."""
    by_task, by_seed = defaultdict(list), defaultdict(list)
    for r in records:
        by_task[r["task"], r["method"]].append(100 * r["headline"])
        by_seed[r["method"], r["seed"]].append(100 * r["headline"])
    table = {task: {m: cell(by_task[task, m]) for m in methods} for task in sorted({r["task"] for r in records})}
    table["average"] = {m: cell([np.mean(v) for (method, _), v in by_seed.items() if method == m]) for m in methods}
    return table


def cell(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation over seeds (0 for one seed)."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def print_table(table: dict, methods: list[str]) -> None:
    width = max(len(task) for task in table) + 2
    print("task".ljust(width) + "".join(m.rjust(16) for m in methods))
    for task, row in table.items():
        if task == "average":
            print("-" * (width + 16 * len(methods)))
        print(task.ljust(width) + "".join(f"{mean:9.2f} ±{std:5.2f}" for mean, std in (row[m] for m in methods)))


# ---------------------------------------------------------------------------------------------------------------------


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_shared_flags(parser)
    group = parser.add_argument_group("evaluation")
    group.add_argument("--methods", nargs="+", choices=METHODS, help="what stands before the query")
    group.add_argument("--checkpoint", help="run folder or checkpoint file of the distiller; needed for mend")
    group.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="MetaICL's seeds: demonstration sets")
    group.add_argument("--limit", type=int, default=0, help="test examples per task; 0 = all")
    group.add_argument("--context-len", type=int, default=900, help="demonstration tokens at most")
    group.add_argument("--only", nargs="+", metavar="TASK", help="these meta-test tasks only")
    group.add_argument("--out", default="", help="results file, one JSON line each; default out/eval-SPLIT.jsonl")
    return parser


def main(argv: list[str] | None = None) -> dict:
    args = parse(get_parser(), argv, PRESETS)
    check(*common.shared_rules(args),
          (args.limit >= 0, f"--limit is {args.limit}; give 0 (all) or more"),
          (args.context_len >= 1, f"--context-len is {args.context_len}; give at least 1 token"),
          ("mend" not in args.methods or args.checkpoint is not None,
           "--methods mend needs --checkpoint DIR, the folder of a train_pretrain.py or train_finetune.py run"),
          *((seed in SEEDS, f"--seeds {seed} is unknown; MetaICL's are {sorted(SEEDS)}") for seed in args.seeds))
    device = setup(args, training=False)
    tasks = load_tasks(args.tasks, args.split)
    for name in args.only or []:
        nearest = common.did_you_mean(name, tasks.test)
        check((name in tasks.test, f"--only {name} is no meta-test task of {args.split} here; {nearest}"))
    llm = load_llm(args.llm, device, common.torch_dtype(args.dtype), args.llm_weights)
    distiller = None
    if args.checkpoint:
        distiller, state = load_distiller(args.checkpoint, llm)
        distiller.eval()
        args.distill_len = state["model"]["distill_len"]
        refuse_seen_tasks(state.get("trained_on", {}), tasks, args)
        if state["model"]["template"] != args.template:
            print(f"note: trained on --template {state['model']['template']}, evaluated on {args.template} (Tab. 7)")
    encoder = make_encoder(args, Tokenizer(args.llm), llm, distiller)
    out = Path(args.out or common.OUT / f"eval-{args.split}.jsonl")
    records = evaluate(args, llm, distiller, encoder, tasks, out)
    table = summarise(records, args.methods)
    n_tasks = len({r["task"] for r in records})
    print(f"\n{args.split}: headline (macro-F1 for classification, accuracy otherwise) in percent, mean ± std over "
          f"{len(args.seeds)} seeds; {n_tasks} of {len(tasks.test + tasks.missing_test)} tasks")
    print_table(table, args.methods)
    print(f"written to {out}")
    return finish({"split": args.split, "tasks": n_tasks, "out": str(out),
                   "headline": {m: {"mean": round(table["average"][m][0], 2), "std": round(table["average"][m][1], 2)}
                                for m in args.methods}})


def refuse_seen_tasks(trained_on: dict, tasks: Tasks, args) -> None:
    """Raise when the checkpoint was finetuned on one of the tasks to evaluate: meta-test tasks must be unseen."""
    stage = trained_on.get("finetune", {})
    if stage.get("tasks") == tasks.collection:
        table = json.loads((common.ROOT / "splits.json").read_text())[tasks.collection]["settings"][stage["split"]]
        seen = sorted((set(table["train"]) - set(table["test"])) & set(args.only or tasks.test))
        check((not seen, (f"the checkpoint was finetuned on {stage['split']}, whose training tasks include "
                          f"{', '.join(seen)}; evaluate it on that --split, or on other tasks with --only")))


def evaluate(args, llm, distiller, encoder: Encoder, tasks: Tasks, out: Path) -> list[dict]:
    """Fill the results file with every (method, task, seed) that it lacks; return the asked ones."""
    out.parent.mkdir(parents=True, exist_ok=True)
    setting = {"llm": Path(args.llm).name, "split": args.split, "tasks": tasks.collection, "k": args.k,
               "distill_len": args.distill_len, "context_len": args.context_len, "template": args.template,
               "retrieval": None, "perturbation": None, "limit": args.limit, "dtype": args.dtype,
               "llm_weights": args.llm_weights}
    checkpoint = common.checkpoint_id(args.checkpoint) if args.checkpoint else None
    key_fields = ("method", "checkpoint", "task", "seed", "data_hash", *setting)
    done = {tuple(r.get(f) for f in key_fields): r for r in read_results(out)}
    records = []
    plan = [(task, seed, m) for task in args.only or tasks.test for seed in args.seeds for m in args.methods]
    with out.open("a") as file:
        for task, seed, method in tqdm(plan, desc="evaluate", unit="set"):
            record = {"method": method, "checkpoint": checkpoint if method == "mend" else None, "task": task,
                      "seed": seed, "data_hash": tasks.data_hash(task, seed), **setting}
            key = tuple(record[f] for f in key_fields)
            if key not in done:
                figures = evaluate_one(args, llm, distiller, encoder, tasks, task, seed, method)
                done[key] = record | figures | {"commit": common.commit(), "date": common.today()}
                file.write(json.dumps(done[key]) + "\n")
                file.flush()
                os.fsync(file.fileno())
            records.append(done[key])
    return records


@torch.no_grad()
def evaluate_one(args, llm, distiller, encoder: Encoder, tasks: Tasks, task: str, seed: int, method: str) -> dict:
    """One (method, task, seed): n, macro_f1, accuracy, headline."""
    files = tasks.files(task, seed)
    demos, queries = files["train"][:args.k], files["test"][:args.limit or None]
    if len(demos) < args.k:
        raise UserError(f"task {task} has {len(demos)} training examples for seed {seed}, and --k is {args.k}; give less")
    require_options(queries)
    prefix = make_prefix(method, demos, encoder.limit(demos + files["test"]), llm, distiller, encoder, args)
    chosen = predict(llm, prefix, encoder, queries, first=method == "zero_shot")
    return {"n": len(queries)} | task_figures(chosen, [q["output"] for q in queries], tasks.types[task])


if __name__ == "__main__":
    run_main(main)
