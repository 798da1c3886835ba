"""Evaluation on the meta-test tasks (Sec. 4): demonstrations or vectors are read once for all queries.

    python evaluate.py --split class_to_class --methods zero_shot icl mend --checkpoint out/fine
    python evaluate.py --tasks FOLDER --methods icl mend --checkpoint DIR --seeds 13 21 --out results.jsonl
    python evaluate.py --table 2 results.jsonl         # the paper's Table 2, beside the paper's own

The label is the argmax over a query's options of the mean token log-likelihood, Eq. (1) for demonstrations
and Eq. (2) for vectors. One line of --out holds one (method, task, seed); a stopped run goes on there.
"""

import argparse
import functools
import json
from pathlib import Path

import torch
from tqdm import tqdm

import common
from common import check, finish, gather, is_main, naming, parse, run_main, setup
from data import Formatter, flat
from loading import checkpoint_id, load_all, refuse_seen_tasks
from model import vector_prefix
from paper.controls import majority, partners, permute_labels, task_vectors
from paper.demos import PERTURBATIONS, SentenceEncoder, perturb, perturbable, predict_each, retrieve
from paper.summary import gains_of, print_summary, read_results, summarise
from score import CONTROLS, METHODS, VECTOR_METHODS, one_prefix, predict, task_metrics
from sources.files import append, held
from sources.headers import refuse_wrong_method
from sources.shard import shares
from sources.signals import Stop
from sources.tasks import SEEDS, Tasks, demonstration_set, require_options, require_scorable, tasks_of
from sources.text import llm_hash

DEFAULT_METHODS = ["zero_shot", "majority", "last_l", "icl", "icl_budget", "mend", "mend_constant"]
PRESETS = {"paper": {"methods": DEFAULT_METHODS}, "pocket": {"methods": DEFAULT_METHODS}}
SEEDLESS = ("zero_shot", "prompt_tuning")  # the same for every demonstration set


def get_parser() -> argparse.ArgumentParser:
    parser = common.make_parser(__doc__, "preset", "llm", "distill-len", "segments", "tasks", *common.OWN,
                                "k", "template", "max-minutes", "device", "dtype", "llm-weights", "shard-llm")
    group = parser.add_argument_group("evaluation")
    group.add_argument("--methods", nargs="+", choices=METHODS, help="what stands before the query")
    group.add_argument("--checkpoint", help="run folder or checkpoint file; needed for mend, its controls, "
                                            "hypertuning and prompt_tuning, of which one call takes one")
    group.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS),
                       help="MetaICL's seeds: demonstration sets")
    group.add_argument("--limit", type=int, default=0, help="test examples per task; 0 = all")
    group.add_argument("--context-len", type=int, default=900, help="demonstration tokens at most")
    group.add_argument("--only", nargs="+", metavar="TASK", help="these meta-test tasks only")
    group.add_argument("--retrieve", choices=("bm25", "dense"), help="each query's own K demonstrations, the "
                       "nearest training examples (docs/own.md), in place of one random set (Tab. 3)")
    group.add_argument("--dense-model",
                       help="sentence encoder of --retrieve dense; default: the LLM's own mean state")
    group.add_argument("--perturb", choices=PERTURBATIONS, help="what demonstrations lose (Tab. 3)")
    group.add_argument("--out", default="", help="results file, in JSON lines; default out/eval-SPLIT.jsonl")
    group.add_argument("--table", nargs="+", metavar=("NUMBER", "FILE"), help="evaluate nothing; print the "
                       "paper's table NUMBER (1, 2, 3, 4, 6 or 7) from results files, in Markdown")
    return parser


def main(argv: list[str] | None = None) -> dict:
    asks_for_table = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    asks_for_table.add_argument("--table", nargs="*")
    if asks_for_table.parse_known_args(argv)[0].table is not None:  # no preset has a part in it
        from paper.tables import print_paper_table
        return print_paper_table(*get_parser().parse_args(argv).table)
    args = parse(get_parser(), argv, PRESETS)
    vector_methods = [m for m in args.methods if m in VECTOR_METHODS]
    own = dict.fromkeys("mend" if m in CONTROLS else m for m in vector_methods)  # whose checkpoint they take
    blind = [m for m in args.methods if m in (*SEEDLESS, "majority", "icl_swapped", *CONTROLS)]
    check(*common.shared_rules(args),
          *common.at_least(args, 0, "limit"), *common.at_least(args, 1, "context_len"),
          (not vector_methods or args.checkpoint is not None,
           f"--methods {' '.join(vector_methods)} needs --checkpoint DIR, the folder of a training run"),
          (len(own) <= 1, f"--methods {' '.join(own)} take a checkpoint each; give one of them a call, with "
                          "the same --out"),
          (not (args.retrieve and args.perturb), "--retrieve and --perturb exclude each other; give one"),
          (not blind or not (args.retrieve or args.perturb),
           f"{' '.join(blind)} has no part in --retrieve and --perturb; leave it out of --methods"),
          (args.segments == 1 or not args.retrieve, "--segments has no part in --retrieve; leave one out"),
          (args.segments != "auto" or "mend_constant" not in args.methods,
           "mend_constant is a mean of as many vectors for every task; give --segments a number"),
          (args.dense_model is None or args.retrieve == "dense", "--dense-model needs --retrieve dense"),
          common.place_rule("--out", args.out),
          *((seed in SEEDS, f"--seeds {seed} is unknown; MetaICL's are {sorted(SEEDS)}")
            for seed in args.seeds))
    for name in ("seeds", "methods", "only"):  # each once
        setattr(args, name, getattr(args, name) and list(dict.fromkeys(getattr(args, name))))
    device = setup(args, training=False)
    tasks = tasks_of(args)
    if len(tasks.test) == 1 and "methods" in args.filled_in:  # there is no other task to average over
        args.methods.remove("mend_constant")
    require_scorable(tasks, args.only, () if args.perturb else args.seeds, args.limit)
    llm, distiller, state, formatter = load_all(args, device)
    trained_on = state.get("trained_on", {}) if args.checkpoint else None
    if args.checkpoint:
        print(f"checkpoint {checkpoint_id(args.checkpoint)}: l = {args.distill_len}, {args.template}")
        refuse_wrong_method(list(own), state, args.checkpoint)
        refuse_seen_tasks(trained_on, tasks, args.only)
        if state["model"]["template"] != args.template:
            print(f"note: trained on --template {state['model']['template']}, evaluated on {args.template}")
    out = Path(args.out or common.OUT / f"eval-{args.split}.jsonl")
    out.parent.mkdir(parents=True, exist_ok=True)
    with held(out, "--out"):
        records = evaluate(args, llm, distiller, trained_on, formatter, tasks, out)
    averages = {m: summarise(records, args.methods, m)["average"] for m in ("headline", "accuracy")}
    n_tasks = len({r["task"] for r in records})
    print(f"\n{args.split}: headline (macro-F1 for classification, accuracy otherwise) in percent, mean ± "
          f"std over {len(args.seeds)} seed(s); {n_tasks} of {len(tasks.test + tasks.missing_test)} tasks")
    print_summary(records, args.methods)
    print(f"written to {out}")
    return finish({"split": args.split, "tasks": n_tasks, "out": str(out),
                   **{metric: {m: {"mean": round(v, 2), "std": round(std, 2) if len(args.seeds) > 1 else None}
                               for m, (v, std) in row.items()}
                      for metric, row in averages.items()},
                   "recovered_gain": {m: round(gain["gain"], 3) for m, gain in gains_of(records).items()}})


def evaluate(args, llm, distiller, trained_on: dict | None, formatter: Formatter, tasks: Tasks,
             out: Path) -> list[dict]:
    """Fill the results file with every (method, task, seed) that it lacks; return the asked ones."""
    dense = SentenceEncoder(args.dense_model, llm, formatter.tokenizer) if args.retrieve == "dense" else None
    retrieval = f"dense:{Path(e).name}@{llm_hash(e)[:6]}" if (e := args.dense_model) else args.retrieve
    setting = {"llm": Path(args.llm).name, "split": args.split, "tasks": tasks.collection, "k": args.k,
               "distill_len": args.distill_len, "context_len": args.context_len, "template": args.template,
               "retrieval": retrieval, "perturbation": args.perturb, "limit": args.limit, "dtype": args.dtype,
               "llm_weights": args.llm_weights, "llm_hash": llm_hash(args.llm),
               "segments": None if args.segments == 1 else args.segments}
    checkpoint = checkpoint_id(args.checkpoint) if args.checkpoint else None
    key_fields = ("method", "checkpoint", "task", "seed", "data_hash", "swapped_with", *setting)
    # older lines have no llm_hash: that they are of this LLM is known by its name
    done = {tuple(r.get(f, setting.get(f) if f == "llm_hash" else None) for f in key_fields): r
            for r in read_results(out, "method", "task", "seed", "headline")}
    records, same_for_all_seeds = [], {}
    names = perturbable(args, tasks)
    permutable = [t for t in names if tasks.types[t] == "classification"]  # elsewhere no label comes again
    if "mend_permuted" in args.methods:
        check((bool(permutable), "mend_permuted needs a classification task, and none is here; leave it out"))
        if left_out := sorted({*names} - {*permutable}):
            print(f"note: mend_permuted leaves out what is no classification: {', '.join(left_out)}")
    plan = [(task, seed, m) for seed in args.seeds for task in names for m in args.methods
            if m != "mend_permuted" or task in permutable]
    distilled = functools.lru_cache(len(tasks.test))(  # of one seed: 3 MB each, of keys and values for l = 64
        lambda t, seed: task_vectors(t, seed, llm, distiller, formatter, tasks, args))
    (rank, ranks), stop = shares(llm), Stop(args.max_minutes)
    gather([])  # all have read the file before rank 0 writes to it
    for first in tqdm(range(0, len(plan), ranks), desc="evaluate", unit="set", disable=not is_main()):
        made = []
        for task, seed, method in plan[first + rank:first + rank + 1]:
            uses_checkpoint = method in VECTOR_METHODS
            others = partners(method, task, names, tasks)
            record = {"method": method, "checkpoint": checkpoint if uses_checkpoint else None,
                      "task": task, "seed": seed,
                      "data_hash": tasks.data_hash(task, seed, args.retrieve is not None), **setting,
                      "swapped_with": " ".join(f"{t}@{tasks.data_hash(t, seed)}" for t in others) or None}
            key = tuple(record[f] for f in key_fields)
            if key not in done:
                queries = json.dumps(tasks.files(task, seed)["test"])
                memo = (method, task, queries) if method in SEEDLESS else None
                made_of = others if uses_checkpoint else []
                vectors = torch.stack([distilled(t, seed) for t in made_of]).mean(dim=0) if made_of else None
                with naming(f"{method} on {task}, seed {seed}"):
                    metrics = same_for_all_seeds.get(memo) or evaluate_one(
                        args, llm, distiller, formatter, tasks, task, seed, method, dense, vectors,
                        others[0] if method in ("icl_swapped", "mend_swapped") else task)
                if memo:
                    same_for_all_seeds[memo] = metrics
                record |= metrics | {"trained_on": trained_on if uses_checkpoint else None,
                                     "commit": common.commit(), "date": common.today()}
            made.append((key, done.get(key, record)))
        for key, record in gather(made) if ranks > 1 else made:  # of all ranks, in the plan's order
            if key not in done and is_main():
                append(out, record)
            records.append(done.setdefault(key, record))
        if max(gather([stop.asked()])) and len(records) < len(plan):
            stop.leave(f"{len(records)} of {len(plan)} results are in {out}")
    stop.listen()
    return records


@torch.no_grad()
def evaluate_one(args, llm, distiller, formatter: Formatter, tasks: Tasks, task: str, seed: int, method: str,
                 dense: SentenceEncoder | None = None,
                 vectors: torch.Tensor | None = None, shown_task: str | None = None) -> dict:
    """One (method, task, seed): n, n_predicted (different answers), demo_tokens (T_d, before what a method
    makes of it; None where there is not one D), macro_f1, accuracy, headline.

    vectors: (1, l, d), to be read in the place of what the method makes of the task's demonstrations.
    shown_task: whose demonstrations these are; default: the task's own.
    """
    files, tokens = tasks.files(task, seed), None
    queries = files["test"][:args.limit or None]
    require_options(queries, formatter.answer)
    if args.retrieve:
        pool = tasks.retrieval_pool(task, seed)
        limit = formatter.limit(pool + files["test"])
        sets = retrieve(args.retrieve, pool, queries, args.k, dense)
        chosen = predict_each(method, sets, limit, llm, distiller, formatter, queries, args)
    else:
        demos, its = demonstration_set(tasks, shown_task or task, seed, args.k)
        limit = formatter.limit(demos + (its if vectors is not None else files)["test"])
        cut = formatter.parts if method in VECTOR_METHODS else lambda *a: [formatter.pieces(*a)]
        if method not in (*SEEDLESS, "mend_constant"):
            tokens = sum(len(flat(part)) for part in cut(demos, limit))
        if method == "majority":
            chosen = majority(demos, queries)
        else:
            # which ones stand there is settled before they change (unless longer labels push out the last)
            shown = perturb(formatter.fitting(demos, limit), args.perturb, seed) if args.perturb else demos
            if method == "mend_permuted":
                shown = permute_labels(formatter.fitting(demos, limit))
            prefix = vector_prefix(llm, vectors, formatter.turns.head) if vectors is not None else \
                one_prefix(method, shown, limit, llm, distiller, formatter, args)
            chosen = predict(llm, prefix, formatter, queries, first=method == "zero_shot")
    metrics = task_metrics(chosen, [q["output"] for q in queries], tasks.types[task])
    return {"n": len(queries), "n_predicted": len(set(chosen)), "demo_tokens": tokens} | metrics


if __name__ == "__main__":
    run_main(main)
