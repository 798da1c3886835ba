"""BIG-bench in MetaICL's layout: tasks for both stages, and functions that only demonstrations tell."""

import argparse
import json
import random
import re
import tarfile
from pathlib import Path

from tqdm import tqdm

from common import SEEDS

SHOTS, MAX_TEST, MIN_TEST, MAX_POOL, MIN_POOL = 16, 400, 40, 2000, 32  # examples
MAX_EXAMPLES, MAX_QUERIES, MIN_QUERIES, MIN_DEV = 500, 100, 8, 2  # examples of a function, test, dev
N_OPTIONS, N_SAME = 8, 4  # options of a function's query; those of the same input, the right one not counted
FUNCTION = {"type": "free-form", "train": False, "test": True}
MAX_CHARS, MAX_LABEL, MAX_OPTIONS = 2000, 400, 26  # characters of an input and of an answer; options
TASK_JSON = re.compile(r"[^/]+/bigbench/benchmark_tasks/([^/]+)/(?:(.+)/)?task\.json")  # family, subtask
FOREIGN = re.compile(r"^(cs|de|mlsum)_|_(ru|multilingual)$")  # the non-English subtasks of English families


def read_text(path: str) -> str:
    """Read one of the tables that come with the repository."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"got no file {path}, expected the one of the repository; restore it")
    return Path(path).read_text(encoding="utf-8")


def load_plan(path: str) -> dict[str, dict]:
    """Read which tasks to convert, if any setting trains or tests on them, and what the functions are."""
    table = json.loads(read_text(path))["bigbench"]
    functions = table.get("functions", {})
    train, test = ({name for split in table["settings"].values() for name in split[side]}
                   for side in ("train", "test"))
    if wrong := sorted((train | test) ^ set(table["task_type"])):
        raise ValueError(f"{path}: got {wrong} in only one of 'settings' and 'task_type', expected each in "
                         "both; add it or delete it there")
    if wrong := sorted(name for name in table["task_type"] if name.partition("-")[0] in functions):
        raise ValueError(f"{path}: got {wrong} in 'task_type' and the family in 'functions', expected one of "
                         "them, as no setting may train on a function; delete it from the settings")
    tasks = {name: {"type": task_type, "train": name in train, "test": name in test}
             for name, task_type in sorted(table["task_type"].items())}
    return {"tasks": tasks, "functions": functions}


def task_of(family: str, subtask: str, plan: dict) -> str | None:
    """The task that a subtask makes: family-subtask, a part of its whole family, or None."""
    name = f"{family}-{subtask}"
    if name in plan["tasks"] or re.fullmatch(plan["functions"].get(family, "(?!)"), subtask):
        return name
    return family if family in plan["tasks"] and not FOREIGN.search(subtask) else None


def clean(text: str) -> str:
    """Trim, and collapse runs of blanks and of line breaks."""
    return re.sub(r" ?\n\s*", "\n", re.sub(r"[^\S\n]+", " ", str(text))).strip()


def read_example(example: dict, task_type: str) -> dict | None:
    """Turn one BIG-bench example into {input, output, options}, or None where it cannot be used."""
    if task_type == "free-form":
        target = example["target"]
        output, options = clean((target or [""])[0] if isinstance(target, list) else target), []
    else:
        scores = example["target_scores"] or {"": 0}
        best = [option for option, score in scores.items() if score == max(scores.values())]
        output = clean(best[0] if len(best) == 1 else "")
        options = list(dict.fromkeys(map(clean, scores)))
    text = clean(example["input"])
    if not 0 < len(text) <= MAX_CHARS or not output or len(options) == 1 or len(options) > MAX_OPTIONS:
        return None
    if not all(0 < len(label) <= MAX_LABEL for label in [output, *options]):
        return None
    return {"input": text, "output": output, "options": options}


def read_family(subtasks: dict[str, list[dict]], task_type: str) -> list[dict]:
    """Merge the subtasks of a family in the order of their names; of each input keep the first example."""
    examples = {}
    for name in sorted(subtasks):
        for raw in subtasks[name]:
            example = read_example(raw, task_type)
            if example is not None:
                examples.setdefault(example["input"], example)
    examples = list(examples.values())
    if task_type == "classification":  # one fixed label set, the same for each example
        labels = sorted({option for example in examples for option in example["options"]})
        examples = [{**example, "options": labels} for example in examples]
    return examples


def write_rows(task: str, name: str, rows: list[dict], out: Path) -> None:
    """Write one file of MetaICL's layout."""
    lines = [json.dumps({"task": task, **row}, ensure_ascii=False) + "\n" for row in rows]
    (out / task).mkdir(exist_ok=True)
    (out / task / f"{task}_{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def write_tests(task: str, test: list[dict], rest: list[dict], n_dev: int, out: Path) -> None:
    """Write a meta-test task: for each seed 16 demonstrations and n_dev dev examples, and the same test."""
    for seed in SEEDS:
        shots = random.Random(f"{task}:{seed}").sample(rest, SHOTS + n_dev)
        for part, rows in {"train": shots[:SHOTS], "dev": shots[SHOTS:], "test": test}.items():
            write_rows(task, f"16_{seed}_{part}", rows, out)


def write_family(family: str, examples: list[dict], plan: dict, out: Path) -> None:
    """Write MetaICL's files of one task: the training pool, and 16 + 16 + test examples for each seed."""
    need = 2 * SHOTS + MIN_TEST if plan["test"] else MIN_POOL
    if len(examples) < need:
        raise ValueError(f"BIG-bench family {family}: got {len(examples)} usable examples, expected at least "
                         f"{need}; take it out of the lists of splits.json that name it")
    random.Random(family).shuffle(examples)
    n_test = min(MAX_TEST, max(MIN_TEST, len(examples) // 2)) if plan["test"] else 0
    test, rest = examples[:n_test], examples[n_test:]
    if plan["train"]:
        write_rows(family, "16384_100_train", rest[:MAX_POOL], out)
    if plan["test"]:
        write_tests(family, test, rest, SHOTS, out)


# --------------------------------------------------------------------------------------------------
# BIG-bench's functions: only the demonstrations say what is to be done with an input


def list_variants(x: list[int]) -> list[str]:
    """What simple functions of a list of numbers would give."""
    results = [x, x[::-1], sorted(x), sorted(x, reverse=True), x[:1], x[-1:], x[1:], x[:-1], x[::2], x + x,
               [len(x)], [sum(x)], [max(x, default=0)], [min(x, default=0)], list(dict.fromkeys(x)),
               [n + 1 for n in x], [2 * n for n in x], [n for n in x if n % 2 == 0], [n for n in x if n > 9]]
    return [str(result) for result in results]


def text_variants(text: str) -> list[str]:
    """What simple functions of a text would give: parts of it, in another order or with other signs between
    them, initials, inflections of a single word, sums of two numbers; in quotes where the text is.
    """
    body = text.strip("'").partition("', '")[0]  # the first of several quoted fields
    words = re.findall(r"[^\W_]+", text) or [body]
    sign = (re.findall(r"(?<=\w)[\W_]+(?=\w)", body) or [" "])[0]
    results = [body, *(sign.join(part) for part in (words[::-1], words[1:], words[:-1])), words[0], words[-1],
               "".join(words), *(other.join(words) for other in "-./"), f"{words[0][0]}. {words[-1]}",
               (words[0][:2] + words[-1][:2]).lower(), body.upper(), body[::-1]]
    if len(words) == 1:
        results += [words[0] + ending for ending in ("s", "ed", "ing", "er", "ly")]
    if len(words) == 2 and all(word.isdecimal() for word in words):
        a, b = map(int, words)
        results += [str(number) for number in (a + b, a - b, b - a, a * b, a + b + 1)]
    return [f"'{result}'" if text.startswith("'") else result for result in results]


def with_options(task: str, example: dict, answers: dict, own: list[str]) -> dict:
    """Give a free-form example eight options, so that Eq. (1) can score it, in an order drawn from its input.

    Up to four are for the same input, so the input does not tell which one is asked for: what the family's
    other functions answer (`answers`), then what simple ones would. The others are the function's answers to
    other inputs (`own`), so its demonstrations alone do not tell either.
    """
    text, rng = example["input"], random.Random(f"{task}:{example['input']}")
    simple = list_variants(json.loads(text)) if re.fullmatch(r"\[[\d, ]*\]", text) else text_variants(text)
    taken, pools = {example["output"]}, []
    for pool in (answers.get(text, ()), map(clean, simple), own):
        pools.append([option for option in sorted(set(pool)) if option and option not in taken])
        taken.update(pools[-1])
        rng.shuffle(pools[-1])
    same = pools[0] + pools[1]
    n_own = N_OPTIONS - 1 - N_SAME
    wrong = same[:N_SAME] + pools[2][:n_own] + same[N_SAME:] + pools[2][n_own:]
    options = [example["output"], *wrong[:N_OPTIONS - 1]]
    rng.shuffle(options)
    return {**example, "options": options}


def write_function(task: str, examples: list[dict], answers: dict, out: Path) -> bool:
    """Write one function as a meta-test task; False where it has too few examples.

    Of the 32 that most have, 12 are the test, and 16 + 4 the demonstrations and the dev examples of each
    seed, drawn from the same 20: the seeds' demonstrations overlap.
    """
    if len(examples) < SHOTS + MIN_QUERIES + MIN_DEV:
        return False
    examples = random.Random(task).sample(examples, min(len(examples), MAX_EXAMPLES))
    own = [example["output"] for example in examples]
    examples = [with_options(task, example, answers, own) for example in examples]
    n_test = min(MAX_QUERIES, max(MIN_QUERIES, (len(examples) - SHOTS) * 3 // 4))
    rest = examples[n_test:]
    write_tests(task, examples[:n_test], rest, min(SHOTS, len(rest) - SHOTS), out)
    return True


def convert_tasks(archives: list[Path], out: Path, args: argparse.Namespace) -> dict:
    """Read the listed tasks' JSON in one pass over the archive and write each in MetaICL's layout."""
    plan, found, counts = load_plan(args.splits), {}, {}
    archive = archives[0]
    bar = tqdm.wrapattr(archive.open("rb"), "read", total=archive.stat().st_size, desc="BIG-bench")
    with bar as stream, tarfile.open(fileobj=stream, mode="r|gz") as tar:
        for member in tar:
            match = TASK_JSON.fullmatch(member.name)
            if match and (task := task_of(match[1], match[2] or "", plan)):
                free = plan["tasks"].get(task, FUNCTION)["type"] == "free-form"
                key = "target" if free else "target_scores"
                rows = json.load(tar.extractfile(member)).get("examples") or []
                found.setdefault(task, {})[match[2] or ""] = [
                    {"input": row["input"], key: row[key]} for row in rows if row.keys() >= {"input", key}]
    for task, item in tqdm(plan["tasks"].items(), desc="tasks", unit="task"):
        examples = read_family(found.pop(task, {}), item["type"])
        write_family(task, examples, item, out)
        counts[task] = len(examples)
    functions = {task: read_family(found[task], "free-form") for task in sorted(found)}
    answers = {family: {} for family in plan["functions"]}
    for task, examples in functions.items():
        for example in examples:
            answers[task.partition("-")[0]].setdefault(example["input"], []).append(example["output"])
    kept = dict.fromkeys(plan["functions"], 0)
    for task, examples in tqdm(functions.items(), desc="functions", unit="task"):
        family = task.partition("-")[0]
        kept[family] += write_function(task, examples, answers[family], out)
    parts = [item["train"] + 3 * len(SEEDS) * item["test"] for item in plan["tasks"].values()]
    return {"tasks": len(counts), "examples": sum(counts.values()), "functions": kept,
            "files": sum(parts) + 3 * len(SEEDS) * sum(kept.values())}
