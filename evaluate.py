"""Evaluation on the meta-test tasks (Sec. 4): demonstrations or vectors are read once, then every query and option.

    python evaluate.py --split class_to_class --methods zero_shot icl icl_budget mend --checkpoint out/finetune-LLM
    python evaluate.py --tasks FOLDER --methods icl mend --checkpoint DIR --seeds 13 21 --limit 100 --out results.jsonl
    python evaluate.py --table 2 results.jsonl           # the paper's Table 2 from results files, beside the paper's own

The label is the argmax over a query's options of the mean token log-likelihood, Eq. (1) for demonstrations and Eq. (2)
for vectors. One line of --out holds one (method, task, seed); a run that was stopped goes on where it was.
"""

import argparse
import functools
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import common
from common import UserError, autocast, check, finish, parse, run_main, setup, sum_over_ranks, world
from data import SEEDS, Encoder, Tasks, Tokenizer, collate, load_tasks, require_options
from demos import PERTURBATIONS, SentenceEncoder, has_labels, permute_labels, perturb, retrieve
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
from tables import CONTROLS, METHODS, TABLES, gains_of, print_summary, read_results, summarise, table_lines

DEFAULT_METHODS = ["zero_shot", "majority", "last_l", "icl", "icl_budget", "mend", "mend_constant"]
PRESETS = {"paper": {"methods": DEFAULT_METHODS}, "pocket": {"methods": DEFAULT_METHODS}}
PASS_TOKENS = {"cpu": 512, "cuda": 2048}  # query and option tokens scored in one pass
SET_TOKENS = 4096  # tokens of demonstrations, queries and options in one pass where each query has its own demonstrations
VECTOR_METHODS = ("prompt_tuning", "hypertuning", "mend", *CONTROLS)  # the LLM reads vectors of a checkpoint
SEEDLESS = ("zero_shot", "prompt_tuning")  # the same for every demonstration set

# ---------------------------------------------------------------------------------------------------------------------
# Methods: what stands before the query


def make_encoder(args: argparse.Namespace, tokenizer: Tokenizer, llm, distiller) -> Encoder:
    """The encoder of examples with the length limits of this LLM and distiller (None where no vectors are made)."""
    return Encoder(tokenizer, args.template, args.context_len, args.distill_len, max_positions(llm.config),
                   max_positions(distiller.backbone.config) if distiller is not None and distiller.backbone else None)


def demo_tokens(method: str, demos: list[dict], limit: int, encoder: Encoder) -> list[int]:
    """What one method reads of the demonstrations. zero_shot: nothing. icl_budget: those that fit into l tokens, the
    honest baseline of equal length. icl and the methods of vectors: all that fit into `limit` tokens.
    last_l: the last l tokens of these, which is where `--vector-start residual` starts from."""
    if method == "zero_shot":
        return []
    if method == "icl_budget":
        return encoder.budget(demos, encoder.distill_len)
    return encoder.demonstrations(demos, limit)[-encoder.distill_len if method == "last_l" else 0:]


def make_prefix(method: str, demo_ids: torch.Tensor, demo_mask: torch.Tensor, llm, distiller, bos_id, args) -> Prefix:
    """What the LLM reads before the queries: the demonstrations, Eq. (1), or their vectors, Eq. (2). ids, mask: (B, T_d)."""
    if method in VECTOR_METHODS:
        with autocast(llm.device, args.dtype):
            vectors = distiller(demo_ids, demo_mask)                                               # (B, l, d)
        return vector_prefix(llm, vectors, bos_id)
    return demo_prefix(llm, demo_ids, demo_mask, bos_id)


def one_prefix(method: str, demos: list[dict], limit: int, llm, distiller, encoder: Encoder, args) -> Prefix:
    """The prefix, B = 1, of one demonstration set, read once for all queries behind it."""
    demo_ids = torch.tensor([demo_tokens(method, demos, limit, encoder)], dtype=torch.long, device=llm.device)  # (1, T_d)
    return make_prefix(method, demo_ids, torch.ones_like(demo_ids, dtype=torch.bool), llm, distiller,
                       encoder.tokenizer.bos_id, args)


# Controls: a distiller that distils needs the demonstrations of this task, with their own labels


def partners(method: str, task: str, evaluated: list[str], tasks: Tasks) -> list[str]:
    """Whose demonstrations stand behind the vectors of a control: mend_swapped, one other task's
    (see Tasks.partner); mend_constant, all others'. Other methods: nobody's.

    The list is that of the tasks evaluated, or, for a single one, of all meta-test tasks.
    """
    if method not in ("mend_swapped", "mend_constant"):
        return []
    names = [t for t in tasks.test if t in evaluated or len(evaluated) == 1]
    check((len(names) > 1, f"{method} needs another meta-test task's demonstrations; {task} is alone here"))
    at = names.index(task)
    if method == "mend_swapped":
        return [tasks.partner(task, names)]
    return names[:at] + names[at + 1:]


@torch.no_grad()
def task_vectors(task: str, seed: int, llm, distiller, encoder: Encoder, tasks: Tasks, args) -> torch.Tensor:
    """(1, l, d): the vectors that `mend` has on a task."""
    demos, files = demonstration_set(tasks, task, seed, args.k)
    demo = encoder.demonstrations(demos, encoder.limit(demos + files["test"]))
    ids = torch.tensor([demo], device=llm.device)                                                  # (1, T_d)
    with autocast(llm.device, args.dtype):
        return distiller(ids, torch.ones_like(ids, dtype=torch.bool))


# ---------------------------------------------------------------------------------------------------------------------
# Scoring and metrics


def passes(queries: list[tuple], device) -> Iterator[dict]:
    """Batches of one row that hold `queries`, (x ids, [option ids, ...]) each, in order, PASS_TOKENS or so at a time."""
    pending, size, most = [], 0, PASS_TOKENS[torch.device(device).type]
    for query in queries:
        tokens = len(query[0]) + sum(map(len, query[1]))
        if pending and size + tokens > most:
            yield collate([{"demo": [], "queries": pending}], device)
            pending, size = [], 0
        pending.append(query)
        size += tokens
    if pending:
        yield collate([{"demo": [], "queries": pending}], device)


@torch.no_grad()
def option_scores(llm, prefix: Prefix, encoder: Encoder, queries: list[dict],
                  first: bool = False) -> list[torch.Tensor]:
    """score_options of each query behind one prefix of B = 1: (options,) each, perhaps with -inf behind
    them."""
    encoded = [encoder.scoring_query(q, first=first) for q in queries]
    return [row for batch in passes(encoded, llm.device) for row in score_options(llm, prefix, batch)[0]]


@torch.no_grad()
def predict(llm, prefix: Prefix, encoder: Encoder, queries: list[dict], first: bool = False) -> list[str]:
    """The chosen option of each query, Eq. (1) and (2); all queries are read behind one prefix of B = 1.

    first: no demonstrations or vectors stand before the queries (zero_shot).

    DEVIATION: Eq. (1) takes the labels seen among the demonstrations; MetaICL and the original code score the task's
    whole option list, and so does this.
    """
    scores = option_scores(llm, prefix, encoder, queries, first)
    return [q["options"][int(row.argmax())] for q, row in zip(queries, scores, strict=True)]


@torch.no_grad()
def predict_each(method: str, sets: list[list[dict]], limit: int, llm, distiller, encoder: Encoder, queries: list[dict],
                 args) -> list[str]:
    """As `predict`, but with a demonstration set for each query, sets[i] for queries[i]: rows of similar length are read
    together, SET_TOKENS or so at a time."""
    rows = [{"demo": demo_tokens(method, demos, limit, encoder), "queries": [encoder.scoring_query(q)]}
            for demos, q in zip(sets, queries, strict=True)]
    lengths = [len(row["demo"]) + len(x) + sum(map(len, options)) for row in rows for x, options in row["queries"]]
    order, chosen = sorted(range(len(rows)), key=lambda i: lengths[i]), [""] * len(rows)
    while order:
        n = max(1, min(len(order), SET_TOKENS // lengths[order[-1]]))
        group, order = order[-n:], order[:-n]
        batch = collate([rows[i] for i in group], llm.device)
        prefix = make_prefix(method, batch["demo_ids"], batch["demo_mask"], llm, distiller, encoder.tokenizer.bos_id, args)
        for i, option in zip(group, score_options(llm, prefix, batch)[:, 0].argmax(dim=1).tolist(), strict=True):
            chosen[i] = queries[i]["options"][option]
    return chosen


def majority(demos: list[dict], queries: list[dict]) -> list[str]:
    """The most frequent label of the demonstrations (of equally frequent ones the first), without any LLM. Where it is
    none of a query's options, as in multiple choice, the option at the position that was right most often."""
    labels = Counter(d["output"] for d in demos).most_common(1)
    places = Counter(d["options"].index(d["output"]) for d in demos if d["output"] in d["options"]).most_common(1)
    label, place = labels[0][0], places[0][0] if places else 0
    return [label if label in q["options"] else q["options"][min(place, len(q["options"]) - 1)] for q in queries]


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
    """Both terms of Eq. (4), choice and headline on the meta-test tasks' dev examples, tasks shared out over
    the ranks; the distiller in fp32, the LLM as it is (see `full_precision`).

    DEVIATION: the paper names the dev data that select a checkpoint, not the quantity. Here it is
    val_option_ce, what evaluation looks at in a form that moves smoothly: the cross-entropy of the right
    option under a softmax over the scores of a query's options.

    Returns:
        val_option_ce (nats a query, mean over each task's queries, then over tasks), val_pred (nats per
        answer token), val_kl and val_clm (negative log-likelihood), both in nats per query and answer token,
        dev_headline (mean over tasks).
    """
    rank, ranks = world()
    seed = args.seed if args.seed in SEEDS else SEEDS[0]
    sums = dict.fromkeys(("pred", "answers", "kl", "clm", "tokens", "headline", "option_ce", "tasks"), 0.0)
    exact = argparse.Namespace(dtype="fp32")
    distiller.eval()
    for task in tasks.test[rank::ranks]:
        demos, files = demonstration_set(tasks, task, seed, args.k)
        queries = files["dev"]
        require_options(queries)
        limit = encoder.limit(demos + queries)
        teacher_prefix = one_prefix("icl", demos, limit, llm, distiller, encoder, exact)
        student_prefix = one_prefix("mend", demos, limit, llm, distiller, encoder, exact)
        for batch in passes([encoder.training_query(q) for q in queries], device):
            student, teacher = query_states(llm, student_prefix, batch), query_states(llm, teacher_prefix, batch)
            mask, answers = loss_mask(llm, batch), batch["query_mask"] & (batch["branch"] > 0)
            sums["kl"] += distill_loss(llm, student[mask], teacher[mask], 1).item()
            sums["pred"] += pred_loss(llm, student[answers], batch["query_ids"][answers], 1).item()
            sums["clm"] += pred_loss(llm, student[mask], batch["query_ids"][mask], 1).item()
            sums["tokens"] += int(mask.sum())
            sums["answers"] += int(answers.sum())
        scores = option_scores(llm, student_prefix, encoder, queries)
        chosen = [q["options"][int(row.argmax())] for q, row in zip(queries, scores, strict=True)]
        sums["headline"] += task_figures(chosen, [q["output"] for q in queries], tasks.types[task])["headline"]
        sums["option_ce"] += float(np.mean([-row.log_softmax(dim=0)[q["options"].index(q["output"])].item()
                                            for q, row in zip(queries, scores, strict=True)]))
        sums["tasks"] += 1
    distiller.train()
    pred, answers, kl, clm, tokens, headline, option_ce, n_tasks = sum_over_ranks(list(sums.values()), device)
    return {"val_option_ce": option_ce / n_tasks, "val_pred": pred / answers, "val_kl": kl / tokens,
            "val_clm": clm / tokens, "dev_headline": headline / n_tasks}


# ---------------------------------------------------------------------------------------------------------------------


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_shared_flags(parser)
    group = parser.add_argument_group("evaluation")
    group.add_argument("--methods", nargs="+", choices=METHODS, help="what stands before the query")
    group.add_argument("--checkpoint", help="run folder or checkpoint file; needed for mend, its controls, "
                                            "hypertuning and prompt_tuning, of which one call takes one")
    group.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="MetaICL's seeds: demonstration sets")
    group.add_argument("--limit", type=int, default=0, help="test examples per task; 0 = all")
    group.add_argument("--context-len", type=int, default=900, help="demonstration tokens at most")
    group.add_argument("--only", nargs="+", metavar="TASK", help="these meta-test tasks only")
    group.add_argument("--retrieve", choices=("bm25", "dense"), help="each query's own K demonstrations, the nearest of all "
                       "training examples, in place of one random set (Tab. 3)")
    group.add_argument("--dense-model", help="sentence encoder of --retrieve dense; default: the LLM's own mean state")
    group.add_argument("--perturb", choices=PERTURBATIONS, help="what is taken from the demonstrations (Tab. 3)")
    group.add_argument("--out", default="", help="results file, one JSON line each; default out/eval-SPLIT.jsonl")
    group.add_argument("--table", nargs="+", metavar=("NUMBER", "FILE"), help="evaluate nothing; print the paper's table "
                       f"NUMBER (1, {', '.join(TABLES)}) from results files, in Markdown")
    return parser


def main(argv: list[str] | None = None) -> dict:
    asks_for_table = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    asks_for_table.add_argument("--table", nargs="*")
    if asks_for_table.parse_known_args(argv)[0].table is not None:  # no preset has a part in it, so none is printed
        return print_paper_table(*get_parser().parse_args(argv).table)
    args = parse(get_parser(), argv, PRESETS)
    vector_methods = [m for m in args.methods if m in VECTOR_METHODS]
    own = dict.fromkeys("mend" if m in CONTROLS else m for m in vector_methods)  # whose checkpoint they take
    blind = [m for m in args.methods if m in (*SEEDLESS, "majority", *CONTROLS)]
    check(*common.shared_rules(args),
          (args.limit >= 0, f"--limit is {args.limit}; give 0 (all) or more"),
          (args.context_len >= 1, f"--context-len is {args.context_len}; give at least 1 token"),
          (not vector_methods or args.checkpoint is not None, (f"--methods {' '.join(vector_methods)} needs --checkpoint DIR, "
           "the folder of a train_pretrain.py or train_finetune.py run")),
          (len(own) <= 1, (f"--methods {' '.join(own)} take a checkpoint each; give one of them a call, "
           "with the same --out")),
          (not (args.retrieve and args.perturb), "--retrieve and --perturb exclude each other; give one"),
          (not blind or not (args.retrieve or args.perturb),
           f"{' '.join(blind)} has no part in --retrieve and --perturb; leave it out of --methods"),
          (args.dense_model is None or args.retrieve == "dense", "--dense-model needs --retrieve dense"),
          common.place_rule("--out", args.out),
          (args.seed == SEEDS[0], f"--seed {args.seed} has no part in evaluation; --seeds names the demonstration sets"),
          *((seed in SEEDS, f"--seeds {seed} is unknown; MetaICL's are {sorted(SEEDS)}") for seed in args.seeds))
    for name in ("seeds", "methods", "only"):  # each once
        setattr(args, name, getattr(args, name) and list(dict.fromkeys(getattr(args, name))))
    device = setup(args, training=False)
    tasks = load_tasks(args.tasks, args.split, args.llm, args.k)
    for name in args.only or []:
        nearest = common.did_you_mean(name, tasks.test)
        check((name in tasks.test, f"--only {name} is no meta-test task of {args.split} here; {nearest}"))
    llm = load_llm(args.llm, device, common.torch_dtype(args.dtype), args.llm_weights)
    distiller, trained_on = None, None
    if args.checkpoint:
        distiller, state = load_distiller(args.checkpoint, llm)
        distiller.eval()
        args.distill_len, trained_on = state["model"]["distill_len"], state.get("trained_on", {})
        refuse_wrong_method(list(own), state, args.checkpoint)
        refuse_seen_tasks(trained_on, tasks, args)
        if state["model"]["template"] != args.template:
            print(f"note: trained on --template {state['model']['template']}, evaluated on {args.template} (Tab. 7)")
    encoder = make_encoder(args, Tokenizer(args.llm), llm, distiller)
    out = Path(args.out or common.OUT / f"eval-{args.split}.jsonl")
    records = evaluate(args, llm, distiller, trained_on, encoder, tasks, out)
    averages = {m: summarise(records, args.methods, m)["average"] for m in ("headline", "accuracy")}
    n_tasks = len({r["task"] for r in records})
    print(f"\n{args.split}: headline (macro-F1 for classification, accuracy otherwise) in percent, mean ± std over "
          f"{len(args.seeds)} seeds; {n_tasks} of {len(tasks.test + tasks.missing_test)} tasks")
    print_summary(records, args.methods)
    print(f"written to {out}")
    return finish({"split": args.split, "tasks": n_tasks, "out": str(out),
                   **{metric: {m: {"mean": round(v, 2), "std": round(std, 2)} for m, (v, std) in row.items()}
                      for metric, row in averages.items()},
                   "recovered_gain": {m: round(gain["gain"], 3) for m, gain in gains_of(records).items()}})


def print_paper_table(number: str, *files: str) -> dict:
    check((number in ("1", *TABLES), f"--table {number} is unknown; give one of 1, {', '.join(TABLES)}"),
          (bool(files), f"--table {number} needs at least one results file after the number"),
          *((Path(f).is_file(), f"--table: {f} is no file; give a results file of evaluate.py") for f in files))
    lines = table_lines([r for f in files for r in read_results(Path(f))], number)
    print("\n".join(lines))
    return finish({"table": number, "files": list(files)})


def method_of(state: dict) -> str:
    """The method that a checkpoint's training makes it, by the checkpoint's state."""
    if state["model"]["distiller"] == "free":
        return "prompt_tuning"
    stages = state.get("trained_on", {})
    # a checkpoint that is older than the flags for it was trained with their defaults
    distils = "pretrain" in stages and stages["pretrain"].get("objective", "kl") != "clm" or \
        "finetune" in stages and stages["finetune"].get("lam", 1) > 0
    return "mend" if distils or not stages else "hypertuning"


def refuse_wrong_method(methods: list[str], state: dict, path: str) -> None:
    """Raise when a checkpoint was not trained in the way that the method's name says."""
    own = method_of(state)
    holds = {"prompt_tuning": "free vectors (--distiller free)", "mend": "a distiller that was trained with L_distill",
             "hypertuning": "a distiller that was trained without L_distill"}[own]
    check((methods in ([], [own]), (f"{path} holds {holds}; evaluate it with --methods {own}, or give a checkpoint of "
                                    f"{' '.join(methods)} (README, Methods)")))


def refuse_seen_tasks(trained_on: dict, tasks: Tasks, args) -> None:
    """Raise when the checkpoint was finetuned on one of the tasks to evaluate: meta-test tasks must be unseen."""
    stage = trained_on.get("finetune", {})
    collections = json.loads((common.ROOT / "splits.json").read_text())
    for name in {*stage.get("tasks", "").split()} & {*tasks.collection.split()} & collections.keys():
        table = collections[name]["settings"][stage["split"]]
        seen = sorted((set(table["train"]) - set(table["test"])) & set(args.only or tasks.test))
        check((not seen, (f"the checkpoint was finetuned on {stage['split']}, whose training tasks include "
                          f"{', '.join(seen)}; evaluate it on that --split, or on other tasks with --only")))


def evaluate(args, llm, distiller, trained_on: dict | None, encoder: Encoder, tasks: Tasks, out: Path) -> list[dict]:
    """Fill the results file with every (method, task, seed) that it lacks; return the asked ones."""
    out.parent.mkdir(parents=True, exist_ok=True)
    retrieval = f"dense:{Path(args.dense_model).name}" if args.dense_model else args.retrieve
    setting = {"llm": Path(args.llm).name, "split": args.split, "tasks": tasks.collection, "k": args.k,
               "distill_len": args.distill_len, "context_len": args.context_len, "template": args.template,
               "retrieval": retrieval, "perturbation": args.perturb, "limit": args.limit, "dtype": args.dtype,
               "llm_weights": args.llm_weights}
    checkpoint = common.checkpoint_id(args.checkpoint) if args.checkpoint else None
    key_fields = ("method", "checkpoint", "task", "seed", "data_hash", "swapped_with", *setting)
    lines = read_results(out)
    if out.exists() and not out.read_text(encoding="utf-8").endswith("\n"):  # a kill has cut the last line short
        out.write_text("".join(f"{json.dumps(r)}\n" for r in lines), encoding="utf-8")
    done = {tuple(r.get(f) for f in key_fields): r for r in lines}
    sentence_encoder = SentenceEncoder(args.dense_model, llm, encoder.tokenizer) if args.retrieve == "dense" else None
    same_for_all_seeds: dict[tuple, dict] = {}
    records = []
    names = perturbable(args, tasks)
    permutable = [t for t in names if tasks.types[t] == "classification"]  # elsewhere no label comes again
    if "mend_permuted" in args.methods:
        check((bool(permutable), "mend_permuted needs a classification task, and none is here; leave it out"))
        if left_out := sorted({*names} - {*permutable}):
            print(f"note: mend_permuted leaves out what is no classification: {', '.join(left_out)}")
    plan = [(task, seed, m) for task in names for seed in args.seeds for m in args.methods
            if m != "mend_permuted" or task in permutable]
    distilled = functools.cache(lambda t, seed: task_vectors(t, seed, llm, distiller, encoder, tasks, args))
    with out.open("a") as file:
        for task, seed, method in tqdm(plan, desc="evaluate", unit="set"):
            uses_checkpoint = method in VECTOR_METHODS
            others = partners(method, task, names, tasks)
            record = {"method": method, "checkpoint": checkpoint if uses_checkpoint else None, "task": task, "seed": seed,
                      "data_hash": tasks.data_hash(task, seed, args.retrieve is not None), **setting,
                      "swapped_with": " ".join(f"{t}@{tasks.data_hash(t, seed)}" for t in others) or None}
            key = tuple(record[f] for f in key_fields)
            if key not in done:
                memo = (method, task, json.dumps(tasks.files(task, seed)["test"])) if method in SEEDLESS else None
                vectors = torch.stack([distilled(t, seed) for t in others]).mean(dim=0) if others else None
                figures = same_for_all_seeds.get(memo) or evaluate_one(args, llm, distiller, encoder, tasks, task, seed, method,
                                                                       sentence_encoder, vectors)
                if memo:
                    same_for_all_seeds[memo] = figures
                done[key] = record | figures | {"trained_on": trained_on if uses_checkpoint else None,
                                                "commit": common.commit(), "date": common.today()}
                file.write(json.dumps(done[key]) + "\n")
                file.flush()
                os.fsync(file.fileno())
            records.append(done[key])
    return records


def demonstration_set(tasks: Tasks, task: str, seed: int, k: int) -> tuple[list[dict], dict[str, list[dict]]]:
    """The first k training examples of (task, seed), and all its files."""
    files = tasks.files(task, seed)
    if len(files["train"]) < k:
        raise UserError(f"task {task} has {len(files['train'])} training examples for seed {seed}, and --k is {k}; give less")
    return files["train"][:k], files


def perturbable(args, tasks: Tasks) -> list[str]:
    """The tasks to evaluate; those where random and wrong labels mean nothing are left out, with a message."""
    names = args.only or tasks.test
    if args.perturb not in ("random_label", "wrong_label"):
        return names
    kept = [t for t in names if all(has_labels(demonstration_set(tasks, t, s, args.k)[0]) for s in args.seeds)]
    if left_out := sorted(set(names) - set(kept)):
        print(f"note: --perturb {args.perturb} means nothing without at least two options; left out: {', '.join(left_out)}")
    check((bool(kept), f"--perturb {args.perturb}: no task has options in its demonstrations; give other tasks"))
    return kept


@torch.no_grad()
def evaluate_one(args, llm, distiller, encoder: Encoder, tasks: Tasks, task: str, seed: int, method: str,
                 sentence_encoder: SentenceEncoder | None = None,
                 vectors: torch.Tensor | None = None) -> dict:
    """One (method, task, seed): n, n_predicted (different answers), macro_f1, accuracy, headline.

    vectors: (1, l, d), to be read in the place of what the method makes of the task's demonstrations.
    """
    files = tasks.files(task, seed)
    queries = files["test"][:args.limit or None]
    require_options(queries)
    if args.retrieve:
        pool = tasks.retrieval_pool(task, seed)
        limit = encoder.limit(pool + files["test"])
        sets = retrieve(args.retrieve, pool, queries, args.k, sentence_encoder)
        chosen = predict_each(method, sets, limit, llm, distiller, encoder, queries, args)
    elif vectors is not None:
        chosen = predict(llm, vector_prefix(llm, vectors, encoder.tokenizer.bos_id), encoder, queries)
    elif method == "majority":
        chosen = majority(demonstration_set(tasks, task, seed, args.k)[0], queries)
    else:
        demos, _ = demonstration_set(tasks, task, seed, args.k)
        limit = encoder.limit(demos + files["test"])
        # which demonstrations stand there is settled before they change, so that all kinds see the same ones (unless
        # longer labels push out the last)
        shown = perturb(encoder.fitting(demos, limit), args.perturb, seed) if args.perturb else demos
        shown = permute_labels(encoder.fitting(demos, limit)) if method == "mend_permuted" else shown
        prefix = one_prefix(method, shown, limit, llm, distiller, encoder, args)
        chosen = predict(llm, prefix, encoder, queries, first=method == "zero_shot")
    figures = task_figures(chosen, [q["output"] for q in queries], tasks.types[task])
    return {"n": len(queries), "n_predicted": len(set(chosen))} | figures


if __name__ == "__main__":
    run_main(main)
