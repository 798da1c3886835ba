"""What `python data.py` prints: Table 1 (Sec. 4.1) for what is here, or one example's whole way."""

import argparse
import json

import numpy as np
from tqdm import tqdm

import common
import data
from common import at_least, check, finish, parse, shared_rules
from data import Formatter, collate
from sources.tasks import SEEDS, Tasks, tasks_of
from sources.text import Tokenizer


def get_parser() -> argparse.ArgumentParser:
    parser = common.make_parser(data.__doc__, "preset", "llm", "tasks", *common.OWN, "template")
    parser.add_argument("--show", type=int, metavar="K",
                        help="show one example with K demonstrations instead of Table 1")
    return parser


def main(argv: list[str] | None = None) -> dict:
    args = parse(get_parser(), argv)
    check(*shared_rules(args), *at_least(args, 1, "show"))
    tasks = tasks_of(args)
    formatter = Formatter(Tokenizer(args.llm), args.template, context_len=900)
    if not args.show:
        return finish({"split": args.split, "collection": tasks.collection, **table1(tasks, formatter)})
    check((bool(tasks.train), f"--show needs a meta-training task, and {args.split} has none; of your own "
                              "tasks, name some with --train-tasks"))
    show(tasks, formatter, args.show)
    return finish({"split": args.split, "task": tasks.train[0]})


def table1(tasks: Tasks, formatter: Formatter) -> dict:
    """Print and return Table 1 for what is here: tasks, examples, mean length of a demonstration (each task's
    first 200)."""
    metrics = {}
    for part in ("train", "test"):
        names, missing = getattr(tasks, part), getattr(tasks, f"missing_{part}")
        lengths, examples = [], 0
        for task in tqdm(names, desc=f"meta-{part} tasks"):
            pool = tasks.pool(task) if part == "train" else tasks.files(task, SEEDS[0])["test"]
            examples += len(pool)
            lengths.append(np.mean([len(formatter.demonstration(e, first=False)) for e in pool[:200]]))
        metrics[part] = {"tasks": len(names), "of": len(names) + len(missing), "examples": examples,
                         "avg_len": round(float(np.mean(lengths)), 2) if lengths else 0.0, "missing": missing}
    for part in ("train", "test"):
        f = metrics[part]
        missing = f" · missing: {', '.join(f['missing'])}" if f["missing"] else ""
        print(f"meta-{part}: {f['tasks']:3d} of {f['of']:3d} tasks · {f['examples']:7d} examples · average "
              f"length {f['avg_len']:.2f} tokens{missing}")
    return metrics


def show(tasks: Tasks, formatter: Formatter, k: int) -> None:
    """Print one training example's whole way: line, text, tokens, batch with its masks."""
    task = tasks.train[0]
    pool = tasks.pool(task)
    check((len(pool) > k, f"task {task} has {len(pool)} examples, and --show {k} needs {k + 1}"))
    row = {"demo": formatter.demonstrations(pool[:k], formatter.limit(pool)),
           "queries": [formatter.training_query(pool[k])]}
    x, (y,) = row["queries"][0]
    decode = formatter.tokenizer.hf.decode
    print(f"line of the file:\n  {json.dumps(pool[k])}")
    for name, ids in (("demonstrations D", row["demo"]), ("query x", x), ("answer y", y)):
        print(f"{name}, {len(ids)} tokens:\n  text {decode(ids)!r}\n  ids  {ids}")
    for name, tensor in collate([row]).items():
        print(f"batch[{name!r}] {tuple(tensor.shape)}:\n  {tensor.long().tolist()[0]}")
