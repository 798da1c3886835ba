"""Does a distiller distil? Every task's vectors asked every task's queries, as a matrix.

    python -m paper.swaps --tasks functions --template newline --checkpoint out/fine --distill-len 32
    python -m paper.figures swaps --results out/swaps.json

A row is a task whose demonstrations were distilled (or, for icl, read), a column one whose queries were
asked: a cell is the share of right answers. A distiller that distils has a diagonal. Not in the paper.
"""

import json
import shlex
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import common
from common import check, finish, parse, run_main, setup
from loading import checkpoint_id, load_all, refuse_seen_tasks
from score import one_prefix, predict
from sources.files import write_whole
from sources.headers import refuse_wrong_method
from sources.tasks import SEEDS, demonstration_set, require_options, tasks_of

METHODS = ("mend", "icl", "last_l")


def get_parser():
    parser = common.make_parser(__doc__, "preset", "llm", "distill-len", "tasks", "split", "k", "template",
                                "seed", "device", "dtype")
    group = parser.add_argument_group("swaps")
    group.add_argument("--checkpoint", required=True, help="run folder or checkpoint file")
    group.add_argument("--methods", nargs="+", choices=METHODS, default=["mend", "icl"],
                       help="a matrix for each")
    group.add_argument("--limit", type=int, default=4, help="queries of each task, its first ones")
    group.add_argument("--context-len", type=int, default=900, help="demonstration tokens at most")
    group.add_argument("--out", default=str(common.OUT / "swaps.json"), help="file to write")
    return parser


def means(matrix: np.ndarray, families: list[str]) -> dict[str, float]:
    """Mean of the diagonal, of the other cells within a family of tasks, and of those across families; in
    percent, None where there is no such cell.

    Args:
        matrix: (n, n), rows distilled, columns asked. families: of the n tasks.
    """
    same = np.equal.outer(families, families)
    own = np.eye(len(families), dtype=bool)
    return {name: round(100 * float(matrix[cells].mean()), 2) if cells.any() else None
            for name, cells in (("diagonal", own), ("same_family", same & ~own), ("elsewhere", ~same))}


@torch.no_grad()
def main(argv: list[str] | None = None) -> dict:
    args = parse(get_parser(), argv)
    check((args.seed in SEEDS, f"--seed {args.seed}: MetaICL's are {sorted(SEEDS)}"),
          common.place_rule("--out", args.out), *common.shared_rules(args),
          *common.at_least(args, 1, "context_len", "limit"))
    device = setup(args, training=False)
    tasks = tasks_of(args)
    check((len(tasks.test) > 1, f"--tasks {' '.join(args.tasks)} has one meta-test task; two are compared"))
    llm, distiller, state, formatter = load_all(args, device)
    refuse_wrong_method(["mend"] if "mend" in args.methods else [], state, args.checkpoint)
    refuse_seen_tasks(state.get("trained_on", {}), tasks)
    sets = {task: demonstration_set(tasks, task, args.seed, args.k) for task in tasks.test}
    asked = [query for _, files in sets.values() for query in files["test"][:args.limit]]
    require_options(asked)
    columns = np.repeat(range(len(sets)), [len(files["test"][:args.limit]) for _, files in sets.values()])
    right = {method: np.zeros((len(sets), len(sets))) for method in args.methods}
    for i, (demos, files) in enumerate(tqdm(sets.values(), desc="swaps", unit="task")):
        limit = formatter.limit(demos + files["test"])
        for method, matrix in right.items():
            prefix = one_prefix(method, demos, limit, llm, distiller, formatter, args)
            chosen = predict(llm, prefix, formatter, asked)
            hits = [p == q["output"] for p, q in zip(chosen, asked, strict=True)]
            matrix[i] = np.bincount(columns, hits) / np.bincount(columns)
    families = [task.partition(":")[0] for task in sets]  # made tasks carry their domain before a colon
    figures = {method: means(matrix, families) for method, matrix in right.items()}
    for method, found in figures.items():
        print(f"{method}: own task's demonstrations {found['diagonal']} · another's of its family "
              f"{found['same_family']} · another family's {found['elsewhere']} percent right")
    about = {"tasks": list(sets), "families": families, "queries": len(asked), "figures": figures,
             "llm": Path(args.llm).name, "checkpoint": checkpoint_id(args.checkpoint),
             "distill_len": args.distill_len, "k": args.k, "seed": args.seed, "dtype": args.dtype,
             "template": args.template, "commit": common.commit(), "date": common.today(),
             "command": shlex.join(["python", "-m", "paper.swaps", *(argv or sys.argv[1:])])}
    matrices = {method: matrix.round(4).tolist() for method, matrix in right.items()}
    write_whole(args.out, json.dumps(about | {"matrices": matrices}) + "\n")
    return finish({"queries": len(asked), **figures, "out": args.out})


if __name__ == "__main__":
    run_main(main)
