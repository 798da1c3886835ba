"""Results files, and the paper's tables made from them.

    python evaluate.py --table 2 results/table2-pocket-gpu.jsonl

A results file holds one JSON line a (method, task, seed), as evaluate.py writes them. The paper's own
figures, for its own LLMs, stand in results/paper.json.
"""

import hashlib
import itertools
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy.stats import t

from common import ROOT, SPLITS, UserError, check, finish
from paper.summary import GAIN, Scores, mean_std, read_results, recovered_gain, scores_of
from score import CONTROLS, METHODS


def require_fields(records: list[dict], taker: str) -> None:
    """Raise UserError unless every line has what tables and figures read; `taker` is who wants that."""
    lacking = sorted({name for r in records for name in NEEDED - r.keys()})
    check((not lacking, f"the results lack {', '.join(lacking)}; {taker} takes lines that evaluate.py wrote"))


def read_paper(number: str) -> dict:
    """The paper's own table `number`."""
    return json.loads((ROOT / "results" / "paper.json").read_text())["tables"][number]


def variant_of(record: dict) -> str:
    """Table 4's row: mend, or what its training did otherwise, by its `trained_on`; else the method."""
    if record["method"] != "mend":
        return record["method"]
    # a checkpoint that is older than the flags for it was trained with their defaults
    pretrain, finetune = ((record["trained_on"] or {}).get(stage) for stage in ("pretrain", "finetune"))
    objective = pretrain.get("objective", "kl") if pretrain else "no_pretraining"
    changes = [objective] * (objective != "kl")
    changes += ["another beta"] * (bool(pretrain) and pretrain.get("beta", 0.8) != 0.8)  # Fig. 6
    if not finetune:
        changes += ["no_finetuning"]  # Fig. 6, which is no row of Table 4
    else:
        changes += ["without_pred"] * (not finetune.get("pred_weight", 1))
        changes += ["without_distill"] * (not finetune.get("lam", 1))
        changes += ["another weight of L_pred"] * (finetune.get("pred_weight", 1) not in (0, 1))
        changes += ["another lambda"] * (finetune.get("lam", 1) not in (0, 1))  # Fig. 7
    return " and ".join(changes) or "mend"


def change_of(record: dict) -> str:
    """Table 3's column: what was done to the demonstrations."""
    return record["perturbation"] or (record["retrieval"] or "none").split(":")[0]


TABLES = {  # number: (what makes a row, what makes a column, rows, columns)
    "2": ("method", "split", METHODS, SPLITS),
    "3": ("method", "change", METHODS,
          ("none", "bm25", "dense", "no_label", "no_input", "random_label", "wrong_label")),
    "4": ("variant", "split",
          ("icl", "mend", "no_pretraining", "clm", "clm+kl", "without_pred", "without_distill"), SPLITS),
    "6": ("method", "split", METHODS, SPLITS),
    "7": ("method", "template", METHODS, ("space", "newline")),
}
FIXED = ("tasks", "split", "k", "context_len", "template", "limit")  # one value a table, or one a column
SHOWN = (*FIXED, "distill_len", "dtype", "llm_weights", "commit")
SAME = ("icl", "icl_swapped", "zero_shot", "majority")  # rows that are the same whatever l is
NEEDED = {*FIXED, "distill_len", "dtype", "commit", "data_hash", "llm", "method", "checkpoint", "trained_on",
          "retrieval", "perturbation", "task", "seed", "headline", "n"}


def latest(records: list[dict]) -> list[dict]:
    """A cell's records that were made like its newest line, and of two of one (task, seed) the later."""
    same = ("checkpoint", "distill_len", "dtype", "llm_weights", "segments", "retrieval", "perturbation")
    return list({(r["task"], r["seed"]): r for r in records
                 if all(r.get(f) == records[-1].get(f) for f in same)}.values())


def belonging(records: list[dict], number: str) -> tuple[list[dict], int]:
    """The records of table `number`, with their `variant` and `change`, and how many were left out since they
    differ from the newest line in what this table does not compare.

    Raises:
        UserError: no record belongs to this table.
    """
    row, column, rows, columns = TABLES[number]
    require_fields(records, f"--table {number}")
    mine = [r | {"variant": variant_of(r), "change": change_of(r)} for r in records]
    mine = [r for r in mine if r[row] in rows and r[column] in columns
            and (column == "change" or r["change"] == "none")]
    if not mine:
        raise UserError(f"no line of the results belongs to table {number}; paper/runs/ makes them")
    fixed = [name for name in FIXED if name != column]
    newest = {r["llm"]: r["llm_hash"] for r in mine if r.get("llm_hash")}  # of one name, one LLM's weights
    same = [r for r in mine if all(r.get(name) == mine[-1].get(name) for name in fixed)
            and r.get("llm_hash") in (None, newest.get(r["llm"]))]
    return same, len(mine) - len(same)


def group(records: list[dict], number: str) -> dict[tuple[str, str, str], list[dict]]:
    """What `belonging` returns by (LLM, row, column), in the table's order, of each the `latest`."""
    row, column, rows, columns = TABLES[number]
    cells = defaultdict(list)
    for r in records:
        cells[r["llm"], r[row], r[column]].append(r)
    llms = dict.fromkeys(r["llm"] for r in records)
    return {(llm, m, c): latest(cells[llm, m, c]) for llm in llms for c in columns for m in rows
            if (llm, m, c) in cells}


def summary(scores: Scores) -> dict:
    """A cell: mean over tasks for each seed, then mean and std over seeds. Tasks that a seed lacks are out.

    Returns:
        mean, std (percent), tasks, seeds, queries (test examples, each counted once).
    """
    seeds = sorted({seed for _, seed in scores})
    tasks = sorted(t for t in {task for task, _ in scores} if all((t, s) in scores for s in seeds))
    if not tasks:
        raise UserError(f"none of {', '.join(sorted({task for task, _ in scores}))} has a result for each of "
                        f"the seeds {seeds}; let the evaluation run to its end first")
    mean, std = mean_std([np.mean([scores[t, s][0] for t in tasks]) for s in seeds])
    return {"mean": mean, "std": std, "tasks": len(tasks), "seeds": len(seeds),
            "queries": sum(scores[t, seeds[0]][1] for t in tasks)}


def paired_interval(ours: Scores, base: Scores, clusters: list[list[str]]) -> dict | None:
    """Ours minus a baseline over the tasks that both have, with a 95% interval; None where they share none.

    A task's gap is the mean over the seeds that both have: seeds of one task are no independent draws, and
    another choice of tasks is what a reader would ask about. Tasks that share their inputs are no independent
    draws either, so it is Student's t with G - 1 degrees of freedom over the G clusters and

        SE^2 = G / (G - 1) sum_g (sum_{task in g} (gap - mean))^2 / n^2.

    Args:
        clusters: tasks that share their inputs; any other is a cluster of its own.
    Returns:
        gap, low, high (infinite for a single cluster), tasks (n).
    """
    gaps_of, sums = defaultdict(list), defaultdict(float)
    for task, seed in sorted(ours.keys() & base.keys()):
        gaps_of[task].append(ours[task, seed][0] - base[task, seed][0])
    if not gaps_of:
        return None
    gaps = {task: float(np.mean(values)) for task, values in gaps_of.items()}
    n, mean = len(gaps), float(np.mean(list(gaps.values())))
    first = {task: cluster[0] for cluster in clusters for task in cluster}
    for task, gap in gaps.items():
        sums[first.get(task, task)] += gap - mean
    G, half = len(sums), float("inf")
    if G > 1:
        half = float(t.ppf(0.975, G - 1) * (G / (G - 1) * sum(v * v for v in sums.values())) ** 0.5 / n)
    return {"gap": mean, "low": mean - half, "high": mean + half, "tasks": n}


def clusters_of(tasks: list[str], inputs: dict[str, set[str]]) -> list[list[str]]:
    """Tasks linked by what they share: functions of one domain ("verb: past"), tasks of one cluster of
    splits.json, those with a query of `inputs`, {task: its queries}, in common."""
    table = json.loads((ROOT / "splits.json").read_text(encoding="utf-8"))["metaicl"]["clusters"]
    linked: list[tuple[list[str], set]] = []
    for task in tasks:
        own = {*inputs.get(task, ()), *(("cluster", i) for i, names in enumerate(table) if task in names)}
        own |= {("domain", task.partition(": ")[0])} if ": " in task else set()
        near = [cluster for cluster in linked if cluster[1] & own]
        linked = [cluster for cluster in linked if cluster not in near]
        linked.append(([*itertools.chain(*(names for names, _ in near)), task],
                       own.union(*(shared for _, shared in near))))
    return [names for names, _ in linked]


def comparable(row: str, cell: list[dict], mend: list[dict]) -> bool:
    """Whether a row stands beside MEND's: what reads l positions has the same, MEND's controls also its
    checkpoint."""
    fields = () if row in SAME else ("distill_len", "segments")
    fields += ("checkpoint",) if row in CONTROLS else ()
    return not mend or all(cell[0].get(f) == mend[0].get(f) for f in fields)


def table1_lines(records: list[dict], paper: dict) -> list[str]:
    """Table 1 in Markdown from data.py's last lines: tasks here of all tasks, average lengths in tokens."""
    check((all({"split", "train", "test"} <= r.keys() for r in records),
           "--table 1 takes the last lines that data.py printed; paper/runs/table1.sh collects them"))
    lines = ["| setting | meta-train tasks | average length | meta-test tasks | average length | paper |",
             "|---" * 6 + "|"]
    for r in records:
        ours = [f"{r[part]['tasks']} of {r[part]['of']} | {r[part]['avg_len']:.2f}"
                for part in ("train", "test")]
        theirs = "–"
        if r["split"] in paper:
            train, train_len, test, test_len = paper[r["split"]]
            theirs = f"{train}, {train_len:.2f}; {test}, {test_len:.2f}"
        lines.append(f"| {r['split']} | {' | '.join(ours)} | {theirs} |")
    return lines


Row = dict[str, tuple[float, float] | None]  # column: mean and std, None where nothing is known
DERIVED = {"2": ("AVG", lambda *means: float(np.mean(means))),
           "4": ("AVG", lambda *means: float(np.mean(means))),
           "7": ("difference", lambda space, newline: newline - space)}


def extended(row: Row, number: str) -> Row:
    """A row with Table 2's and 4's AVG or Table 7's difference, which need all of several columns."""
    if number not in DERIVED or len(row) < 2:
        return row
    name, combine = DERIVED[number]
    return row | {name: (combine(*(mean for mean, _ in row.values())), 0.0) if all(row.values()) else None}


def marked(values: dict[str, float | None]) -> dict[str, str]:
    """How each row's mean is set: the best bold, the second underlined."""
    ranked = sorted({round(v, 2) for v in values.values() if v is not None}, reverse=True)
    form = {**{v: "{}" for v in ranked}, **dict(zip(ranked, ("**{}**", "<u>{}</u>"), strict=False))}
    return {row: "{}" if v is None else form[round(v, 2)] for row, v in values.items()}


def block(llm: str, rows: dict[str, Row], header: list[str]) -> list[str]:
    """Markdown lines of one LLM, a line for each row."""
    lines = {name: f"| {llm} | {name} |" for name in rows}
    for column in header:
        means = {name: row[column] and row[column][0] for name, row in rows.items()}
        forms = marked(means) if column != "difference" else dict.fromkeys(rows, "{}")
        for name, row in rows.items():
            std = f" ±{row[column][1]:.2f}" if row[column] and row[column][1] >= 0.005 else ""
            lines[name] += (" – |" if row[column] is None else
                            f" {forms[name].format(f'{means[name]:.2f}')}{std} |")
    return [*lines.values()]


def notes(cells: dict[tuple[str, str, str], Scores], summaries: dict[tuple[str, str, str], dict],
          n_tasks: dict[str, int], grouped: dict[tuple[str, str, str], list[dict]]) -> list[str]:
    """How much each cell rests on, and MEND against the other rows. n_tasks: a column's tasks, here or
    not; grouped: the cells' lines."""
    clusters = clusters_of(sorted({r["task"] for cell in grouped.values() for r in cell}), {})
    counts, gains, gaps = defaultdict(list), defaultdict(list), []
    for (llm, row, column), scores in cells.items():
        icl, zero_shot = (cells.get((llm, m, column), {}) for m in ("icl", "zero_shot"))
        if row not in ("icl", "zero_shot") and (gain := recovered_gain(scores, icl, zero_shot)):
            gains[llm, column, gain["tasks"]].append(f"{row} {gain['gain']:.0%}")
        s = summaries[llm, row, column]
        counts[llm, column, s["tasks"], s["queries"], s["seeds"]].append(row)
        mend = llm, "mend", column
        if not comparable(row, grouped[llm, row, column], grouped.get(mend, [])):
            gaps.append(f"- {llm}, {column}, {row}: of another l, number of segments or checkpoint than "
                        "mend, not compared")
        elif row != "mend" and (b := paired_interval(cells.get(mend, {}), scores, clusters)):
            gaps.append(f"- {llm}, {column}, mend minus {row}: {b['gap']:+.2f} "
                        f"[{b['low']:+.2f}, {b['high']:+.2f}] (95%, t over {b['tasks']} tasks)")
    return [f"- {llm}, {column}, {', '.join(rows)}: {tasks} of {n_tasks[column]} tasks, {queries:,} queries, "
            f"{seeds} seeds" for (llm, column, tasks, queries, seeds), rows in counts.items()] + gaps + [
        f"- {llm}, {column}, recovered gain, {GAIN} over the {tasks} tasks where icl is above zero_shot: "
        f"{', '.join(rows)}" for (llm, column, tasks), rows in gains.items()]


def one_label(grouped: dict[tuple[str, str, str], list[dict]]) -> list[str]:
    """A line for each cell in which one label was all that a method answered on some (task, seed)."""
    return [f"- {llm}, {column}, {row}: one label for all queries in {len(same)} of {len(cell)} (task, seed)"
            ": " + ", ".join({r["task"]: 0 for r in same}) for (llm, row, column), cell in grouped.items()
            if (same := [r for r in cell if r.get("n_predicted") == 1])]


def table_lines(records: list[dict], number: str) -> list[str]:
    """The paper's table `number` in Markdown: ours, the paper's own, how much ours rests on, MEND
    against the others.

    Raises:
        UserError: as `belonging`.
    """
    if number == "1":
        return table1_lines(records, read_paper("1"))
    records, left_out = belonging(records, number)
    grouped = group(records, number)
    records = [r for cell in grouped.values() for r in cell]
    cells = {place: scores_of(cell) for place, cell in grouped.items()}
    columns = [c for c in TABLES[number][3] if any(c == column for _, _, column in cells)]
    header = [*columns, *([DERIVED[number][0]] if number in DERIVED and len(columns) > 1 else [])]
    summaries = {place: summary(scores) for place, scores in cells.items()}
    figures = {place: (s["mean"], s["std"]) for place, s in summaries.items()}
    papers = read_paper(number) if records[0]["tasks"] == "metaicl" and records[0]["k"] == 16 else {}
    figures |= {(f"paper, {llm}", row, c): tuple(known[c]) for llm, rows in papers.items()
                for row, known in rows.items() for c in columns if c in known}
    lines = []
    for llm in dict.fromkeys(llm for llm, _, _ in figures):
        rows = {row: {c: figures.get((llm, row, c)) for c in columns} for row in TABLES[number][2]}
        lines += block(llm, {name: extended(row, number) for name, row in rows.items() if any(row.values())},
                       header)
    collections = json.loads((ROOT / "splits.json").read_text())
    collection = collections.get(records[0]["tasks"], {})  # none: made tasks
    settings = collection.get("settings", {})
    setting = {c: settings.get(c, settings.get(records[0]["split"])) for c in columns}  # none: functions
    n_tasks = {c: len(s["test"] if s else {r["task"] for r in records}) for c, s in setting.items()}
    segments = ["segments"] if any(r.get("segments") for r in records) else []
    shown = {name: sorted({str(r.get(name)) for r in records}) for name in (*SHOWN, *segments)}
    hashes = " ".join(sorted({r["data_hash"] for r in records}))
    shown["data hash"] = [hashlib.sha256(hashes.encode()).hexdigest()[:12]]
    return [f"| LLM | row | {' | '.join(header)} |", "|" + "---|" * (len(header) + 2), *lines, "",
            "Headline (macro-F1 for classification, accuracy otherwise) in percent, mean ± std over seeds. "
            + " · ".join(f"{name} {', '.join(v)}" for name, v in shown.items()),
            *[f"- left out: {left_out} lines of another {', '.join(FIXED)} than the newest line's"
              ] * (left_out > 0),
            *notes(cells, summaries, n_tasks, grouped), *one_label(grouped)]


def print_paper_table(number: str, *files: str) -> dict:
    """evaluate.py's --table NUMBER FILE...; returns what its last line says."""
    check((number in ("1", *TABLES), f"--table {number} is unknown; give one of 1, {', '.join(TABLES)}"),
          (bool(files), f"--table {number} needs at least one results file after the number"),
          *((Path(f).is_file(), f"--table: {f} is no file; give a results file of evaluate.py")
            for f in files))
    print("\n".join(table_lines([r for f in files for r in read_results(Path(f))], number)))
    return finish({"table": number, "files": list(files)})
