"""Which LLM and template gain from demonstrations at all: zero-shot against ICL on the dev examples.

    python -m paper.choose --tasks FOLDER --llms assets/SmolLM2-135M-Instruct assets/gemma-3-270m

A distiller passes on what the LLM takes from demonstrations, so there must be something to pass on. The dev
examples decide; test examples are not read. Not in the paper.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import common
from common import check, finish, parse, run_main, setup
from data import Formatter
from loading import load_llm, max_positions
from paper.held_out import option_ces
from score import one_prefix, option_scores, task_metrics
from sources.tasks import SEEDS, demonstration_set, load_tasks, require_options
from sources.template import TEMPLATES
from sources.text import Tokenizer


def get_parser() -> argparse.ArgumentParser:
    parser = common.make_parser(__doc__, "preset", "llm", "tasks", "split", "k", "device", "dtype")
    group = parser.add_argument_group("choice")
    group.add_argument("--llms", nargs="+", help="LLMs to compare; default: --llm alone")
    group.add_argument("--templates", nargs="+", choices=sorted(TEMPLATES),
                       default=sorted(TEMPLATES.keys() - {"chat"}), help="templates to compare")
    group.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=[SEEDS[0]],
                       help="demonstration sets")
    group.add_argument("--context-len", type=int, default=900, help="demonstration tokens at most")
    return parser


@torch.no_grad()
def gain(llm, formatter: Formatter, tasks, seeds: list[int], k: int, args) -> dict[str, dict[str, float]]:
    """{method: {headline (percent), option_ce (nats a query)}}, means over the meta-test tasks and seeds."""
    found: dict[str, list] = {"zero_shot": [], "icl": []}
    for task in tqdm(tasks.test, desc=f"{Path(args.llm).name}, {formatter.template}", unit="task"):
        for seed in seeds:
            demos, files = demonstration_set(tasks, task, seed, k)
            queries = files["dev"]
            require_options(queries)
            golds, limit = [q["output"] for q in queries], formatter.limit(demos + queries)
            for method, rows in found.items():
                prefix = one_prefix(method, demos, limit, llm, None, formatter, args)
                scores = option_scores(llm, prefix, formatter, queries, first=method == "zero_shot")
                chosen = [q["options"][int(row.argmax())] for q, row in zip(queries, scores, strict=True)]
                headline = 100 * task_metrics(chosen, golds, tasks.types[task])["headline"]
                rows.append((headline, np.mean(option_ces(queries, scores))))
    means = {method: np.mean(rows, axis=0) for method, rows in found.items()}
    return {m: {"headline": round(float(h), 2), "option_ce": round(float(c), 3)}
            for m, (h, c) in means.items()}


def main(argv: list[str] | None = None) -> dict:
    args = parse(get_parser(), argv)
    for name in ("llms", "templates", "seeds"):  # each once
        setattr(args, name, getattr(args, name) and list(dict.fromkeys(getattr(args, name))))
    llms = args.llms or [args.llm]
    check(*common.shared_rules(args), *common.at_least(args, 1, "context_len"),
          (len({Path(name).name for name in llms}) == len(llms),
           f"--llms {' '.join(llms)}: two folders have one name, which a row is named by; rename one"))
    device, found = setup(args, training=False), {}
    for name in llms:
        args.llm = name
        llm, tokenizer = load_llm(name, device, common.torch_dtype(args.dtype)), Tokenizer(name)
        tasks = load_tasks(args.tasks, args.split, name, args.k)
        for template in args.templates:
            formatter = Formatter(tokenizer, template, args.context_len,
                                  llm_positions=max_positions(llm.config))
            found[f"{Path(name).name}, {template}"] = gain(llm, formatter, tasks, args.seeds, args.k, args)
    print("| LLM, template | zero-shot | ICL | gain | option CE, zero-shot | ICL |\n" + "|---" * 6 + "|")
    for name, row in found.items():
        (zero, zero_ce), (icl, icl_ce) = (row[method].values() for method in ("zero_shot", "icl"))
        print(f"| {name} | {zero:.1f} | {icl:.1f} | {icl - zero:+.1f} | {zero_ce:.2f} | {icl_ce:.2f} |")
    return finish({"collection": tasks.collection, "split": args.split, "seeds": args.seeds,
                   "tasks": len(tasks.test), "found": found})


if __name__ == "__main__":
    run_main(main)
