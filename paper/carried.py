"""What the vectors carry, as Markdown tables: each method for each l, and MEND against every control.

    python -m paper.carried results/ratios-functions.jsonl results/ratios-recall.jsonl
    python -m paper.carried results/bigbench-functions.jsonl --inputs assets/bigbench

Lines of evaluate.py; what icl and zero_shot answer depends on no l, so one line of them will do. The gap to a
control is a mean over tasks with a 95% interval (see tables.paired_interval): functions of one domain share
their inputs and count as one cluster, as do MetaICL's tasks that share theirs, and those that --inputs finds.
Not in the paper.
"""

import argparse
from pathlib import Path

import numpy as np

from common import check, finish, run_main
from paper.summary import gains_of, read_results, require_one_setting, scores_of
from paper.tables import SAME, clusters_of, paired_interval, require_fields, summary
from sources.text import json_lines

ORDER = ("zero_shot", "majority", "last_l", "icl_budget", "prompt_tuning", "hypertuning", "mend",
         "mend_swapped", "mend_permuted", "mend_constant", "icl_swapped", "icl")


def inputs_in(folder: str, tasks: list[str]) -> dict[str, set[str]]:
    """The queries of each task in a folder of MetaICL's layout, of all its seeds."""
    found = {task: {row["input"] for path in sorted(Path(folder, task).glob(f"{task}_16_*_test.jsonl"))
                    for _, row in json_lines(path, "an example")} for task in tasks}
    lacking = sorted(task for task, xs in found.items() if not xs)
    check((not lacking, f"--inputs {folder} has no queries of {', '.join(lacking[:3])}; give their folder"))
    return found


def carried(records: list[dict], inputs: dict[str, set[str]] | None = None) -> dict:
    """{"tokens": mean T_d, "segments": how many of l vectors each, None for one, "methods": {l: {method:
    {mean, std, accuracy, gain, gap}}}}.

    mean and std are of the headline, in percent; gain is the recovered one, None where icl gains nothing; gap
    is MEND's mean minus the method's: {gap, low, high, tasks}, None for mend itself; for icl_swapped it is
    ICL's mean minus it, as mend_swapped's is MEND's.
    """
    both = [r for r in records if r["method"] in SAME]
    lengths = sorted({r["distill_len"] for r in records if r["method"] not in SAME}, reverse=True)
    clusters = clusters_of(sorted({r["task"] for r in records}), inputs or {})
    tokens = [r["demo_tokens"] for r in both if r["method"] == "icl" and r.get("demo_tokens")]
    found: dict[int, dict] = {}
    for length in lengths or [0]:
        here = [*both, *(r for r in records if r["method"] not in SAME and r["distill_len"] == length)]
        cells = {m: [r for r in here if r["method"] == m] for m in ORDER}
        scores = {m: scores_of(rows) for m, rows in cells.items() if rows}
        gains = gains_of(here)
        found[length] = {m: summary(s) | {
            "accuracy": 100 * float(np.mean([r["accuracy"] for r in cells[m]])),
            "gain": gains[m]["gain"] if m in gains else None,
            "gap": None if m == own or own not in scores else paired_interval(scores[own], s, clusters)}
            for m, s in scores.items() for own in ["icl" if m == "icl_swapped" else "mend"]}
    return {"tokens": float(np.mean(tokens)) if tokens else None, "methods": found,
            "segments": records[0].get("segments")}


def table_lines(name: str, made: dict) -> list[str]:
    """The Markdown of one results file: a row for each method and l."""
    any_row = next(iter(next(iter(made["methods"].values())).values()))
    tokens = "" if made["tokens"] is None else f", {made['tokens']:.0f} tokens of demonstrations on average"
    tokens += f", in {made['segments']} segments of l vectors each" if made["segments"] else ""
    lines = [f"{name}: {any_row['tasks']} tasks, {any_row['queries']} queries a set, {any_row['seeds']} "
             f"sets{tokens}", "",
             "| l | method | headline | accuracy | recovered gain | MEND minus it |", "|---" * 6 + "|"]
    for length, rows in made["methods"].items():
        for method, r in rows.items():
            gain = "" if r["gain"] is None or method in ("icl", "zero_shot") else f"{r['gain']:.0%}"
            gap = r["gap"] and ("ICL " if method == "icl_swapped" else "") + \
                f"{r['gap']['gap']:+.1f} [{r['gap']['low']:+.1f}, {r['gap']['high']:+.1f}]"
            std = f" ±{r['std']:.1f}" if r["seeds"] > 1 else ""
            lines.append(f"| {length} | {method} | {r['mean']:.1f}{std} | {r['accuracy']:.1f} | {gain} | "
                         f"{gap or ''} |")
    return lines


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="results files of evaluate.py")
    parser.add_argument("--inputs", metavar="FOLDER", help="the tasks' folder, in MetaICL's layout: those "
                        "that share a query count as one cluster")
    return parser


def main(argv: list[str] | None = None) -> dict:
    args = get_parser().parse_args(argv)
    made = {}
    for file in args.files:
        records = read_results(Path(file))
        check((bool(records), f"{file} has no lines; make it with evaluate.py --out {file}"))
        require_fields(records, "paper.carried")
        require_one_setting(file, records)
        tasks = sorted({r["task"] for r in records})
        made[Path(file).stem] = carried(records, args.inputs and inputs_in(args.inputs, tasks))
        print("\n".join(table_lines(Path(file).stem, made[Path(file).stem])) + "\n")
    return finish({"files": args.files}) | {"made": made}


if __name__ == "__main__":
    run_main(main)
