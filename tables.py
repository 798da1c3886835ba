"""Results files, and the paper's tables made from them.

    python evaluate.py --table 2 results/table2-pocket.jsonl

A results file holds one JSON line a (method, task, seed), as evaluate.py writes them. The paper's own figures, for its
own LLMs, stand in results/paper.json.
"""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from common import ROOT, SPLITS, UserError

METHODS = ("zero_shot", "majority", "icl", "icl_budget", "prompt_tuning", "hypertuning", "mend")

# ---------------------------------------------------------------------------------------------------------------------
# Results files


def read_results(path: Path) -> list[dict]:
    """The lines of a results file; a last line that a kill cut short is dropped from the file."""
    if not path.exists():
        return []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        if lines[-1]:
            path.write_text("".join(f"{line}\n" for line in lines[:-1]), encoding="utf-8")
        return [json.loads(line) for line in lines[:-1]]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a results file of evaluate.py ({error}); give another one") from error


def read_paper(number: str) -> dict:
    """The paper's own table `number`."""
    return json.loads((ROOT / "results" / "paper.json").read_text())["tables"][number]


def mean_std(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation over seeds (0 for one seed)."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


# ---------------------------------------------------------------------------------------------------------------------
# The paper's tables: what is a row, what is a column


def variant_of(record: dict) -> str:
    """Table 4's row: what a distiller's training left out, from the record's `trained_on`."""
    stages = record["trained_on"]
    if stages is None:
        return record["method"]
    if "pretrain" not in stages:
        return "no_pretraining"
    if stages["pretrain"]["objective"] != "kl":
        return stages["pretrain"]["objective"]
    finetune = stages.get("finetune", {"lam": 1, "pred_weight": 1})
    return "without_pred" if not finetune["pred_weight"] else "without_distill" if not finetune["lam"] else "mend"


def change_of(record: dict) -> str:
    """Table 3's column: what was done to the demonstrations."""
    return record["perturbation"] or (record["retrieval"] or "none").split(":")[0]


TABLES = {  # number: (row, column, their order)
    "2": (lambda r: r["method"], lambda r: r["split"], METHODS, SPLITS),
    "3": (lambda r: r["method"], change_of, METHODS,
          ("none", "bm25", "dense", "no_label", "no_input", "random_label", "wrong_label")),
    "4": (variant_of, lambda r: r["split"], ("icl", "mend", "no_pretraining", "clm", "clm+kl", "without_pred",
                                              "without_distill"), SPLITS),
    "6": (lambda r: r["method"], lambda r: r["split"], METHODS, SPLITS),
    "7": (lambda r: r["method"], lambda r: r["template"], METHODS, ("space", "newline")),
}


def group(records: list[dict], number: str) -> dict[str, dict[str, dict[str, dict]]]:
    """Records by LLM, row and column: {(task, seed): headline in percent and n}. Of two lines of one cell's (task, seed)
    the later one counts."""
    row_of, column_of, rows, columns = TABLES[number]
    table = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for r in records:
        row, column = row_of(r), column_of(r)
        if row in rows and column in columns:
            table[r["llm"]][row][column][r["task"], r["seed"]] = (100 * r["headline"], r["n"])
    return table


def summary(scores: dict[tuple[str, int], tuple[float, int]]) -> dict:
    """One cell: for each seed the mean over tasks, then mean and std over seeds. Tasks that a seed lacks are left out.

    Returns:
        mean, std (percent), tasks, seeds, queries (test examples, each counted once).
    """
    seeds = sorted({seed for _, seed in scores})
    tasks = sorted(t for t in {task for task, _ in scores} if all((t, s) in scores for s in seeds))
    if not tasks:
        raise UserError("no task has a result for every seed; let the evaluation run to its end first")
    mean, std = mean_std([np.mean([scores[t, s][0] for t in tasks]) for s in seeds])
    return {"mean": mean, "std": std, "tasks": len(tasks), "seeds": len(seeds),
            "queries": sum(scores[t, seeds[0]][1] for t in tasks)}


def paired_bootstrap(ours: dict, base: dict, draws: int = 10_000) -> dict:
    """Ours minus a baseline over the (task, seed) that both have, with a 95% interval.

    Resamples the pairs with replacement; both methods keep their own result of each drawn pair.
    """
    pairs = sorted(ours.keys() & base.keys())
    gaps = np.array([ours[p][0] - base[p][0] for p in pairs])
    means = gaps[np.random.default_rng(0).integers(len(gaps), size=(draws, len(gaps)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return {"gap": float(gaps.mean()), "low": float(low), "high": float(high), "pairs": len(pairs)}


# ---------------------------------------------------------------------------------------------------------------------
# Printing


def table1_lines(records: list[dict], paper: dict) -> list[str]:
    """Table 1 in Markdown from data.py's last lines: tasks here of tasks in all, and average lengths in tokens."""
    lines = ["| setting | meta-train tasks | average length | meta-test tasks | average length | paper |", "|---" * 6 + "|"]
    for r in records:
        ours = [f"{r[part]['tasks']} of {r[part]['of']} | {r[part]['avg_len']:.2f}" for part in ("train", "test")]
        train, train_len, test, test_len = paper[r["split"]]
        lines.append(f"| {r['split']} | {' | '.join(ours)} | {train}, {train_len:.2f}; {test}, {test_len:.2f} |")
    return lines


def marked(values: dict[str, float | None]) -> dict[str, str]:
    """How each row's mean is set: the best bold, the second underlined."""
    ranked = sorted({round(v, 2) for v in values.values() if v is not None}, reverse=True)
    form = {**{v: "{}" for v in ranked}, **dict(zip(ranked, ("**{}**", "<u>{}</u>"), strict=False))}
    return {row: "{}" if v is None else form[round(v, 2)] for row, v in values.items()}


def block(llm: str, cells: dict[str, dict[str, tuple[float, float] | None]], columns: list[str]) -> list[str]:
    """Markdown lines of one LLM: a line for each row; cells[row][column] is (mean, std) or None."""
    forms = {c: marked({row: value[c] and value[c][0] for row, value in cells.items()}) for c in columns}
    lines = []
    for row, value in cells.items():
        texts = ["–" if value[c] is None else
                 forms[c][row].format(f"{value[c][0]:.2f}") + (f" ±{value[c][1]:.2f}" if value[c][1] else "") for c in columns]
        lines.append(f"| {llm} | {row} | " + " | ".join(texts) + " |")
    return lines


def with_average(cells: dict, columns: list[str], number: str) -> tuple[dict, list[str]]:
    """Add Table 2's and 4's AVG, where a row has all columns, and Table 7's difference."""
    if number == "7" and len(columns) == 2:
        return {row: value | {"difference": (value["newline"][0] - value["space"][0], 0.0) if all(value.values()) else None}
                for row, value in cells.items()}, [*columns, "difference"]
    if number in "24" and len(columns) > 1:
        return {row: value | {"AVG": (float(np.mean([v[0] for v in value.values()])), 0.0) if all(value.values()) else None}
                for row, value in cells.items()}, [*columns, "AVG"]
    return cells, columns


def table_lines(records: list[dict], number: str) -> list[str]:
    """The paper's table `number` in Markdown: ours, how much stands behind it, MEND against the others, the paper's own.

    Raises:
        UserError: no record belongs to this table.
    """
    if number == "1":
        return table1_lines(records, read_paper("1"))
    _, _, rows, columns = TABLES[number]
    table = group(records, number)
    if not table:
        raise UserError(f"no line of the results belongs to table {number}; runs/ has the script that makes them")
    columns = [c for c in columns if any(c in row for found in table.values() for row in found.values())]
    paper = read_paper(number)
    n_tasks = {s: len(setting["test"]) for s, setting in
               json.loads((ROOT / "splits.json").read_text())[records[-1]["tasks"]]["settings"].items()}
    lines, details, header = [], [], None
    for llm, found in table.items():
        summaries = {row: {c: summary(found[row][c]) if found[row].get(c) else None for c in columns}
                     for row in rows if row in found}
        cells, header = with_average({row: {c: s and (s["mean"], s["std"]) for c, s in value.items()}
                                      for row, value in summaries.items()}, columns, number)
        lines += block(llm, cells, header)
        for c in columns:
            behind = {(s["tasks"], s["queries"], s["seeds"]): [] for value in summaries.values() if (s := value[c])}
            for row, value in summaries.items():
                if s := value[c]:
                    behind[s["tasks"], s["queries"], s["seeds"]].append(row)
            total = n_tasks[c if c in n_tasks else records[-1]["split"]]
            details += [f"- {c}, {', '.join(names)}: {tasks} of {total} tasks, {queries:,} queries, {seeds} seeds"
                        for (tasks, queries, seeds), names in behind.items()]
            for row in found:
                if row != "mend" and c in found[row] and c in found.get("mend", {}):
                    b = paired_bootstrap(found["mend"][c], found[row][c])
                    details.append(f"- {c}, mend minus {row}: {b['gap']:+.2f} [{b['low']:+.2f}, {b['high']:+.2f}] "
                                   f"(95%, paired bootstrap over {b['pairs']} (task, seed))")
    for llm, known in paper.items():
        cells = {row: {c: known[row][c] and tuple(known[row][c]) if c in known[row] else None for c in columns}
                 for row in rows if row in known}
        if any(v for value in cells.values() for v in value.values()):
            cells, _ = with_average(cells, columns, number)
            lines += block(f"paper, {llm}", cells, header)
    settings = {name: sorted({str(r[name]) for r in records}) for name in
                ("tasks", "k", "distill_len", "context_len", "template", "limit", "dtype", "commit")}
    return [f"| LLM | row | {' | '.join(header)} |", "|" + "---|" * (len(header) + 2), *lines, "",
            "Headline (macro-F1 for classification, accuracy otherwise) in percent, mean ± std over seeds. "
            + " · ".join(f"{name} {', '.join(v)}" for name, v in settings.items()), *details]
