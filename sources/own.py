"""Your own tasks: files of examples, folders of them, tables and data sets, cut by seed into MetaICL's parts.

    python evaluate.py --tasks mine/ --methods zero_shot icl               # every task that is there
    python train_finetune.py --tasks mine/ --test-tasks "billing_*"        # trains on the others
    python train_finetune.py --tasks mine/ --split mine.json               # {"train": [...], "test": [...]}
    python evaluate.py --tasks reviews.csv --columns input=text output=label

A task is a file NAME.jsonl[.gz], .csv, .tsv or .parquet, or a folder NAME in MetaICL's layout. Of a file,
up to 16 dev examples are set apart, the same for every seed; a seed draws K demonstrations (16 at least) from
the others, and the rest are queries. Where labels repeat and no options are given, the labels are the
options.
"""

import contextlib
import csv
import fnmatch
import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import common
from common import UserError, check, did_you_mean, is_main
from sources.hub import require_hub
from sources.tasks import SEEDS, Example, Tasks, different, is_plain_name, shuffled
from sources.text import first_line, json_lines

LINES, TABLES = (".jsonl", ".jsonl.gz"), (".csv", ".tsv", ".parquet")
N_DEV, SKETCH = 16, 64  # dev examples at most; hashes that a checkpoint keeps of a task


@dataclass
class OwnTasks(Tasks):
    """Tasks of one's own. k: demonstrations that a set must have. columns: of --columns, as a dictionary."""

    k: int = 16
    columns: dict[str, str] = field(default_factory=dict)
    places: dict[str, Path | str] = field(default_factory=dict)  # task -> file, folder or data set

    def is_own(self) -> bool:
        return True

    def record(self) -> dict:
        return {"own_tasks": {task: " ".join(sorted(self.hashes(task))[:SKETCH]) for task in self.train}}

    def hashes(self, task: str) -> set[str]:
        """A hash of each example of a task. The smallest ones are a sample that does not know the file's
        name, its order, or what was added to it."""
        return {hashlib.sha256(json.dumps([e["input"], e["output"]]).encode()).hexdigest()[:8]
                for e in self.pool(task)}

    def seen(self, own_tasks: dict[str, str]) -> list[str]:
        """The meta-test tasks of whose examples more than half were a training task's of this record, or that
        hold more than half of one's, as far as the kept hashes tell: two at least are the same."""
        def shares(own: set[str], kept: set[str]) -> bool:
            known = {h for h in own if len(kept) < SKETCH or h <= max(kept)}  # would be kept, if trained on
            return 2 * len(known & kept) > max(2, min(len(known), len(kept)))

        trained = [set(text.split()) for text in own_tasks.values()]
        return [task for task in self.test if trained
                and any(shares(own, kept) for own in [self.hashes(task)] for kept in trained)]

    def examples(self, task: str) -> list[dict]:
        """All different examples of a task that is not cut yet."""
        if task not in self.pools:
            self.pools[task] = different(read_task(task, self.places[task], self.columns))
        return self.pools[task]

    def is_cut(self, task: str) -> bool:
        """Whether a task is a folder that holds MetaICL's parts for seeds."""
        return any(Path(self.places[task]).glob(f"{task}_16_*_test.jsonl"))

    def pool(self, task: str) -> list[dict]:
        place = self.places[task]
        if task not in self.pools and Path(place).is_dir():
            whole = Path(place) / f"{task}_16384_100_train.jsonl"
            paths = [whole] if whole.exists() else self.retrieval_files(task)
            self.pools[task] = different(e for path in paths for e in read_task(task, path, self.columns))
        return self.examples(task)

    def files(self, task: str, seed: int) -> dict[str, list[dict]]:
        if self.is_cut(task):
            return super().files(task, seed)
        pool, shots = list({e["input"]: e for e in reversed(self.pool(task))}.values())[::-1], max(16, self.k)
        n_dev = dev_size(len(pool))
        needed = next(n for n in itertools.count(shots) if n > shots + dev_size(n))
        check((len(pool) >= needed, f"task {task} has {len(pool)} different inputs, and {needed} are needed: "
               f"{shots} demonstrations, {dev_size(needed)} for dev, one query; add some, leave it out"
               + ", or lower --k" * (shots > 16)))
        first = shuffled(pool, task, SEEDS[0])
        rest = shuffled(first[n_dev:], task, seed)
        # dev is the same for every seed: what selects a checkpoint is no seed's query
        return {"train": rest[:shots], "dev": first[:n_dev], "test": rest[shots:]}

    def retrieval_pool(self, task: str, seed: int) -> list[dict]:
        if self.is_cut(task):
            return super().retrieval_pool(task, seed)
        return self.files(task, seed)["train"]

    def data_hash(self, task: str, seed: int, retrieval: bool = False) -> str:
        if self.is_cut(task):
            return super().data_hash(task, seed, retrieval)
        return hashlib.sha256(json.dumps(self.files(task, seed)).encode()).hexdigest()[:12]


def dev_size(n: int) -> int:
    """Dev examples that are set apart of n inputs, whatever K is."""
    return min(N_DEV, max(1, (n - 16) // 3))


def find_places(spec: str) -> dict[str, Path | str]:
    """Task -> where its examples are, for a file, a folder of files and folders, or a data set of the hub."""
    path = Path(spec)
    if not path.exists():  # the name of a data set, such as stanfordnlp/sst2
        check((re.fullmatch(r"[\w.-]+(/[\w.-]+)?", spec) is not None,
               f"--tasks {spec} does not exist; give metaicl, bigbench, or a folder or file of your own"))
        require_hub(f"--tasks {spec} is no file or folder, and a data set")
        return {spec.rpartition("/")[2]: spec}
    found: dict[str, Path | str] = {}
    others = []
    for place in [path] if path.is_file() else sorted(path.iterdir()):
        suffix = kind_of_file(place)
        name = place.name[:len(place.name) - len(suffix)]
        is_task = bool(suffix) if place.is_file() else any(place.glob(f"{name}_16*.jsonl"))
        if not is_task:
            others += [place.name] * (place.is_file() and not name.startswith("."))
            continue
        check((is_plain_name(name), f"--tasks {spec}: {name!r} names no task; use letters, digits, _"),
              (name not in found, f"--tasks {spec}: {found.get(name)} and {place} are both the task {name}; "
                                  "rename one"))
        found[name] = place
    check((bool(found), f"--tasks {spec} holds no task; expected files NAME.jsonl[.gz], NAME.csv, NAME.tsv "
           "or NAME.parquet, or MetaICL's NAME/NAME_16384_100_train.jsonl, NAME/NAME_16_100_test.jsonl"))
    if others and is_main():
        print(f"note: no task, as neither .jsonl[.gz], .csv, .tsv nor .parquet: {', '.join(others)[:80]}")
    return found


def kind_of_file(place: Path | str) -> str:
    """The ending of a file of examples, as it is written, or nothing."""
    endings = [s for s in (*LINES, *TABLES) if str(place).lower().endswith(s)]
    return str(place)[-len(endings[0]):] if endings else ""


def load_own(spec: str, split: str, k: int, train_tasks: list[str] | None = None,
             test_tasks: list[str] | None = None, columns: list[str] | None = None,
             strict: bool = True) -> OwnTasks:
    """The tasks of a file, folder or data set, shared out by a split file, by --train-tasks and --test-tasks,
    or, without any of these, all to meta-test. strict: each name there is to be one of these tasks."""
    places, by_file = find_places(spec), split.endswith(".json")
    name = "own-" + "_".join(Path(spec).name.split())  # not the name of a collection of ours
    train, test, types = read_split(split, places) if by_file else by_flags(places, train_tasks, test_tasks)
    if strict:
        require_named([*places], spec, split, {"train_tasks": train_tasks, "test_tasks": test_tasks})
    both = sorted({*train} & {*test})
    check((not both, f"{', '.join(both)} cannot be in meta-train and in meta-test; name each once"))
    split = Path(split).stem if by_file else "own"
    tasks = OwnTasks(Path(spec), name, split, train, test, [], [], types, k=k, places=places,
                     columns=columns_of(columns))
    if is_main():
        print(f"{spec}: {len(train)} meta-training and {len(test)} meta-test tasks of your own"
              + ("" if train else "; name some with --train-tasks to train on them"))
        if whole := [task for task in test if not tasks.is_cut(task)]:
            named = ", ".join(whole[:3]) + ", ..." * (len(whole) > 3)
            print(f"up to {N_DEV} examples of {named} are for dev; of the others a seed draws {max(16, k)} "
                  "demonstrations, and the rest are queries")
    for task in [*train, *test]:
        types.setdefault(task, kind_of(tasks, task))
    return tasks


def kind_of(tasks: OwnTasks, task: str) -> str:
    """classification, where all examples have the same options, else multi-choice."""
    examples = tasks.pool(task) if not tasks.is_cut(task) or task in tasks.train else \
        tasks.files(task, 100)["test"]
    return "classification" if len({tuple(sorted(e["options"])) for e in examples}) == 1 else "multi-choice"


def read_split(path: str, places: dict) -> tuple[list[str], list[str], dict[str, str]]:
    """train, test and types of a split file, {"train": [...], "test": [...], "types": {task: kind}}."""
    form = '{"train": ["a"], "test": ["b"], "types": {"b": "classification"}}, types left out or whole'
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
        train, test, types = table.get("train", []), table.get("test", []), table.get("types", {})
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"--split {path} cannot be read ({first_line(error)}); expected {form}") from error
    fine = all(isinstance(names, list) and all(isinstance(n, str) for n in names) for names in (train, test))
    fine = fine and isinstance(types, dict) and all(isinstance(v, str) for v in types.values())
    check((fine and bool(train or test), f"--split {path}: expected {form}"))
    train, test = ([name for name in dict.fromkeys(names) if name in places] for names in (train, test))
    return train, test, {name: kind for name, kind in types.items() if name in places}


def require_named(here: list[str], where: str, split: str, own: dict) -> None:
    """Raise UserError where a split file, --train-tasks or --test-tasks name what is no task of `here`."""
    if split.endswith(".json"):
        table = json.loads(Path(split).read_text(encoding="utf-8"))  # as read_split has found it
        check(*((name in here, f"--split {split}: there is no task {name!r}; {did_you_mean(name, here)}")
                for name in [*table.get("train", []), *table.get("test", [])]))
    check(*((bool(fnmatch.filter(here, glob)), f"--{flag.replace('_', '-')} {glob} is no task of {where}; "
             f"{did_you_mean(glob, here)}")
            for flag in ("train_tasks", "test_tasks") for glob in own.get(flag) or []))


def by_flags(places: dict, train_tasks: list[str] | None,
             test_tasks: list[str] | None) -> tuple[list[str], list[str], dict[str, str]]:
    """train, test and (no) types by --train-tasks and --test-tasks; what is not given is the rest."""
    train, test = ([name for name in places if any(fnmatch.fnmatchcase(name, glob) for glob in globs or [])]
                   for globs in (train_tasks, test_tasks))
    if not test_tasks:
        test = [name for name in places if name not in train]
    elif not train_tasks:
        train = [name for name in places if name not in test]
    return train, test, {}


def columns_of(pairs: list[str] | None) -> dict[str, str]:
    """--columns input=text output=label as {"input": "text", ...}."""
    columns = {"input": "input", "output": "output", "options": "options"}
    for pair in pairs or []:
        name, _, column = pair.partition("=")
        check((name in columns and column, f"--columns {pair}: expected input=NAME, output=, options="))
        columns[name] = column
    return columns


def read_task(task: str, place: Path | str, columns: dict[str, str]) -> list[dict]:
    """The examples of one task: {"task", "input", "output", "options"}, which know their line or row.

    Raises:
        UserError, with file and line: no such column, no text, an output that is none of its options; one
        label only where the labels would be the options.
    """
    examples = examples_in(task, place, columns)
    labels = sorted({e["output"] for e in examples})
    if not any(e["options"] for e in examples) and len(labels) <= len(examples) // 2:
        check((len(labels) > 1, f"{place} has one label only, {labels[0]!r}, so there is nothing to choose; "
               "give options, or examples of another label"))
        for e in examples:
            e["options"] = labels
    return examples


def examples_in(task: str, place: Path | str, columns: dict[str, str], labelled: bool = True) -> list[dict]:
    """The examples of one file or data set as its rows give them; not `labelled`: an output may lack ("").

    Raises:
        UserError, with file and line: no such column, no text, an output that is none of its options.
    """
    examples, form = [], f'{{"{columns["input"]}": ..., "{columns["output"]}": ...}}'
    needs = ("input", "output") if labelled else ("input",)
    for where, row in rows_of(place, form):
        missing = [columns[name] for name in needs if row.get(columns[name]) is None]
        check((not missing, f"{where} has no {' and no '.join(missing)}, only "
               f"{', '.join(str(c) for c in row if row[c] is not None)[:80]}"
               f"; expected {form}, or name the columns: --columns input=... output=..."))
        texts = [str(v) if isinstance(v, int | float) and not isinstance(v, bool) and v == v  # no NaN
                 else v for v in (row.get(columns[name]) for name in ("input", "output"))]
        if not labelled and texts[1] is None:
            texts[1] = ""
        options = row.get(columns["options"]) or []
        if isinstance(options, str):  # a table's cell
            with contextlib.suppress(ValueError, RecursionError):
                options = json.loads(options)
        wrong = [columns[name] for name, t in zip(("input", "output"), texts, strict=True)
                 if not isinstance(t, str) or (name in needs and not t.strip())]
        check((not wrong, f"{where}: {' and '.join(wrong)} must be text, and not empty"),
              (isinstance(options, list) and all(isinstance(o, str) and o.strip() for o in options),
               f'{where}: options must be a list of texts, as in ["yes", "no"]'))
        example = Example(task=task, input=texts[0].strip(), output=texts[1].strip(),
                          options=[o.strip() for o in options])
        example.where = where
        check((len({*example["options"]}) != 1 or not labelled,
               f"{where}: one option is no choice; give two, or none"),
              (not options or not example["output"] or example["output"] in example["options"],
               f"{where}: the output {example['output']!r} is none of its options {example['options']}"))
        examples.append(example)
    check((bool(examples), f"{place} is empty; give lines such as {form}"))
    return examples


def csv_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """(where, row) of a table whose cells are text as it stands, be it 007 or None, below their names."""
    number = 0
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            csv.field_size_limit(1 << 30)
            tabs = path.suffix.lower() == ".tsv"
            how = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {}  # a tsv has no quotes
            reader = csv.DictReader(file, strict=True, **how)
            names = reader.fieldnames or []
            check((len({*names}) == len(names), f"{path} names a column twice: {', '.join(names)[:80]}"),
                  (len(names) > 1 or not re.search("[;\t]", "".join(names)), f"{path} has one column, "
                   f"{''.join(names)[:40]!r}; separate cells with commas (in a .tsv with tabs)"))
            for number, row in enumerate(reader, 1):
                where = f"{path}, row {number}"
                check((None not in row and None not in row.values(), f"{where} has not as many cells as the "
                       'first line' + ('; put texts with commas or line breaks in quotes, as in "a, b"',
                                       ", where tabs part cells and lines end rows")[tabs]))
                yield where, row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read after row {number} ({first_line(error)}); give a UTF-8 "
                        "table with commas (.tsv: tabs), its first line the names of the columns") from error


def rows_of(place: Path | str, form: str) -> Iterator[tuple[str, dict]]:
    """(where, row) of a file of lines, a table, or a data set of the hub; class numbers become names."""
    ending = kind_of_file(place).lower()
    if ending in LINES:
        yield from json_lines(Path(place), form)
        return
    if ending in (".csv", ".tsv"):
        yield from csv_rows(Path(place))
        return
    import datasets
    cache = str(common.CACHE / "datasets")
    try:
        if ending == ".parquet":
            table = datasets.Dataset.from_parquet(str(place), cache_dir=cache)
        else:
            table = datasets.load_dataset(str(place), split="train", cache_dir=cache)
    except Exception as error:  # each of the libraries below has errors of its own
        raise UserError(f"{place} cannot be read ({first_line(error)}); give another file or "
                        "name") from error
    names = {c: f.names for c, f in table.features.items() if isinstance(f, datasets.ClassLabel)}
    for number, row in enumerate(table, 1):
        yield f"{place}, row {number}", {c: names[c][v] if c in names and v is not None and v >= 0 else v
                                         for c, v in row.items()}
