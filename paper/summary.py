"""A results file read back and summed up: by task, on average, and as recovered gain."""

import contextlib
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from common import UserError, check

TEXTS = ("method", "task", "data_hash", "llm", "split", "tasks", "template", "dtype", "commit")
SHARES, WHOLE = ("headline", "accuracy", "macro_f1"), ("seed", "n", "k", "distill_len", "context_len")
GAIN = "(method - zero_shot) / (icl - zero_shot)"
Scores = dict[tuple[str, int], tuple[float, int]]  # (task, seed): headline in percent, n


def wrong_field(record: dict) -> str | None:
    """The first of a line's fields that cannot be what evaluate.py writes there, as "name is value"."""
    rules = dict.fromkeys(TEXTS, lambda v: isinstance(v, str)) | dict.fromkeys(
        WHOLE, lambda v: type(v) is int and v >= 0) | dict.fromkeys(
        SHARES, lambda v: type(v) in (int, float) and 0 <= v <= 1)  # so NaN is none
    rules |= {"trained_on": lambda v: v is None or isinstance(v, dict) and all(
                  isinstance(stage, dict) for stage in v.values()),
              "demo_tokens": lambda v: v is None or type(v) is int and v >= 0,
              **dict.fromkeys(("checkpoint", "retrieval", "perturbation"),
                              lambda v: v is None or isinstance(v, str))}
    return next((f"{name} is {str(record[name])[:60]}" for name, holds in rules.items()
                 if name in record and not holds(record[name])), None)


def read_results(path: Path, *fields: str) -> list[dict]:
    """The lines of a results file; a last line that a kill cut short is left out.

    Raises:
        UserError: another kind of file; a line without one of `fields`, or with a value that cannot be one.
    """
    if not path.exists():
        return []
    try:
        *lines, last = path.read_text(encoding="utf-8").split("\n")
        records = [json.loads(line) for line in lines]
        with contextlib.suppress(ValueError):
            records.append(json.loads(last))
        if not all(isinstance(r, dict) for r in records) or (last and last[0] != "{"):
            raise ValueError("a line is no JSON object")
        if wrong := next(filter(None, map(wrong_field, records)), None):
            raise ValueError(f"in a line {wrong}")
        if missing := [name for name in fields if any(name not in r for r in records)]:
            raise ValueError(f"a line has no {missing[0]}")
        return records
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a results file of evaluate.py ({error}); give another one") from error


SETTING = ("llm", "split", "tasks", "k", "context_len", "template", "limit", "dtype", "llm_weights",
           "retrieval", "perturbation", "segments")


def require_one_setting(path: str | Path, records: list[dict]) -> None:
    """Raise UserError unless lines differ in method, task, seed and l alone, and one checkpoint made all
    vectors: else a mean would run over what does not belong together."""
    values = {name: sorted({str(r.get(name)) for r in records}) for name in SETTING}
    for name in ("checkpoint", "llm_hash"):  # that not all lines have
        values[name] = sorted({str(r[name]) for r in records if r.get(name)})
    mixed = [f"{name} {' and '.join(found)}" for name, found in values.items() if len(found) > 1]
    check((not mixed, f"{path} has lines of {'; '.join(mixed)}, which cannot share a table; give a file with "
           "one of them"))


def mean_std(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation over seeds (0 for one seed)."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def summarise(records: list[dict], methods: list[str], metric: str = "headline") -> dict:
    """Per task and on average: mean and standard deviation over seeds of a metric, in percent. A method that
    was not evaluated on a task has no entry there, and its average is without it."""
    by_task, by_seed = defaultdict(list), defaultdict(list)
    for r in records:
        by_task[r["task"], r["method"]].append(100 * r[metric])
        by_seed[r["method"], r["seed"]].append(100 * r[metric])
    table = {task: {m: mean_std(by_task[task, m]) for m in methods if (task, m) in by_task}
             for task in sorted({r["task"] for r in records})}
    table["average"] = {m: mean_std([np.mean(v) for (method, _), v in by_seed.items() if method == m])
                        for m in methods}
    return table


def print_summary(records: list[dict], methods: list[str]) -> None:
    """Headlines by task and on average, average accuracy and recovered gain, as aligned text. A * says that,
    in one of the seeds, one label was all that a method answered."""
    table, accuracy = summarise(records, methods), summarise(records, methods, "accuracy")["average"]
    gains, one = gains_of(records), {(r["task"], r["method"]) for r in records if r.get("n_predicted") == 1}
    width, several = max(len("recovered gain"), *map(len, table)) + 2, len({r["seed"] for r in records}) > 1

    def text(name: str, cells: Iterable[str]) -> str:
        return name.ljust(width) + "".join(cell.rjust(17) for cell in cells)

    def line(name: str, row: dict) -> str:
        star = {m: "*" if (name, m) in one else " " for m in methods}
        form = ("{:.2f} ±{:5.2f}" if several else "{:.2f}").format  # one seed has no deviation, not that of 0
        return text(name, (form(*row[m]) + star[m] if m in row else "– " for m in methods))
    print(text("task", (f"{m} " for m in methods)))
    for task, row in table.items():
        if task == "average":
            print("-" * (width + 17 * len(methods)))
        print(line(task, row))
    print(line("accuracy", accuracy))
    if gains:
        print(text("recovered gain", (f"{gains[m]['gain']:.0%} " if m in gains else "– " for m in methods)))
        print(f"recovered gain: {GAIN}, over the {gains['icl']['tasks']} tasks where icl is above zero_shot")


def recovered_gain(ours: Scores, icl: Scores, zero_shot: Scores) -> dict | None:
    """How much of what demonstrations bring a method keeps: (ours - zero_shot) / (icl - zero_shot), of means
    over the tasks where icl, averaged over seeds, is above zero_shot; None where no shared task is so.

    icl's own figures choose those tasks, so noise makes the denominator too large and the share too small.
    """
    means = defaultdict(list)
    for task, seed in ours.keys() & icl.keys() & zero_shot.keys():
        means[task].append([scores[task, seed][0] for scores in (ours, icl, zero_shot)])
    gained = [m for m in (np.mean(rows, axis=0) for rows in means.values()) if m[1] > m[2]]
    if not gained:
        return None
    method, full, none = np.mean(gained, axis=0)
    return {"gain": float((method - none) / (full - none)), "tasks": len(gained)}


def scores_of(records: list[dict]) -> Scores:
    return {(r["task"], r["seed"]): (100 * r["headline"], r["n"]) for r in records}


def gains_of(records: list[dict]) -> dict[str, dict]:
    """recovered_gain of each method; nothing without records of both icl and zero_shot."""
    cells = {m: scores_of([r for r in records if r["method"] == m])
             for m in dict.fromkeys(r["method"] for r in records)}
    icl, zero_shot = cells.get("icl", {}), cells.get("zero_shot", {})
    return {m: gain for m, scores in cells.items() if (gain := recovered_gain(scores, icl, zero_shot))}
