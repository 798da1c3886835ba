"""Where tasks come from: MetaICL's files, a folder laid out alike, the hub, or made here (Sec. 4.1)."""

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

import common
from common import FUNCTIONS, ROOT, SEEDS, UserError, check, did_you_mean
from sources import assets
from sources.files import held, temporary_of
from sources.text import HUB_REVISIONS, HUB_TASKS, Tokenizer, hub_rows, json_lines

MADE = {"functions", "early", "recall"}  # tasks of sources/synthetic.py


class Example(dict):
    """{"task", "input", "output", "options"} that knows its line: `where`, as an error names it."""

    where = ""


def different(examples: Iterable[dict]) -> list[dict]:
    """The examples without exact duplicates."""
    return list({(e["input"], e["output"]): e for e in examples}.values())


@dataclass
class Tasks:
    """The tasks of one split on disk. `collection`: metaicl or bigbench, whose table in splits.json holds."""

    folder: Path
    collection: str
    split: str
    train: list[str]
    test: list[str]
    missing_train: list[str]
    missing_test: list[str]
    types: dict[str, str]
    pools: dict[str, list[dict]] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)

    def pool(self, task: str) -> list[dict]:
        """A meta-training task's examples, exact duplicates dropped."""
        if task not in self.pools:
            self.pools[task] = different(read_examples(self.folder / task / f"{task}_16384_100_train.jsonl"))
        return self.pools[task]

    def size(self, task: str) -> int:
        """How many different examples a meta-training task can give to one set."""
        return len(self.pool(task))

    def draw(self, rng: np.random.Generator, k: int, queries: int) -> tuple[str, list[dict], list[dict]]:
        """A meta-training task, k of its examples as demonstrations, and `queries` others."""
        task = self.train[rng.integers(len(self.train))]
        pool = self.pool(task)
        chosen = [pool[i] for i in rng.choice(len(pool), k + queries, replace=False)]
        return task, chosen[:k], chosen[k:]

    def partner(self, task: str, among: list[str]) -> str:
        """Whose demonstrations are swapped in for a task's: half the list on, as families stand together."""
        return among[(among.index(task) + len(among) // 2) % len(among)]

    def limit(self, task: str, limit_of: Callable[[list[dict]], int]) -> int:
        """Formatter.limit of a meta-training task's examples."""
        if task not in self.limits:
            self.limits[task] = limit_of(self.pool(task))
        return self.limits[task]

    def paths(self, task: str, seed: int) -> dict[str, Path]:
        folder = self.folder / task
        return {part: folder / f"{task}_16_{seed}_{part}.jsonl" for part in ("train", "dev", "test")}

    def files(self, task: str, seed: int) -> dict[str, list[dict]]:
        """The train (demonstrations), dev and test examples of a meta-test task for a seed of MetaICL's."""
        check((self.paths(task, seed)["test"].exists(), f"{self.folder / task} has no files of seed {seed}; "
               f"MetaICL's seeds are {', '.join(map(str, sorted(SEEDS)))}"))
        return {part: read_examples(path) for part, path in self.paths(task, seed).items()}

    def retrieval_files(self, task: str) -> list[Path]:
        """Where demonstrations are retrieved from: the 100-shot training files, else those of all seeds."""
        return sorted((self.folder / task).glob(f"{task}_100_*_train.jsonl")) or \
            sorted((self.folder / task).glob(f"{task}_16_*_train.jsonl"))

    def retrieval_pool(self, task: str, seed: int) -> list[dict]:
        """Different examples to retrieve demonstrations from; none asks what the dev or test file asks."""
        files = self.files(task, seed)
        banned = {e["input"] for e in files["test"] + files["dev"]}
        return different(e for path in self.retrieval_files(task) for e in read_examples(path)
                         if e["input"] not in banned)

    def is_own(self) -> bool:
        """Whether some of them are the user's own (sources/own.py)."""
        return False

    def record(self) -> dict:
        """What a checkpoint keeps of its meta-training tasks, to refuse them in evaluation."""
        return {}

    def seen(self, own_tasks: dict[str, str]) -> list[str]:
        """Own meta-test tasks that a checkpoint with this record has seen in training."""
        return []

    def training_hash(self) -> str:
        """Content hash of the meta-training tasks."""
        pools = [[task, self.pool(task)] for task in self.train]
        return hashlib.sha256(json.dumps(pools).encode()).hexdigest()[:12]

    def dev_hash(self, seed: int) -> str:
        """Content hash of the files that a training with --seed looks at between its steps."""
        seed = seed if seed in SEEDS else SEEDS[0]
        hashes = [[task, self.data_hash(task, seed)] for task in self.test]
        return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:12]

    def data_hash(self, task: str, seed: int, retrieval: bool = False) -> str:
        """Content hash of the files that an evaluation of (task, seed) reads."""
        files = [*self.paths(task, seed).values(), *(self.retrieval_files(task) if retrieval else [])]
        return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


@dataclass
class Mixture(Tasks):
    """Several collections in one: training draws from each as often, evaluation goes through all."""

    parts: list[Tasks] = field(default_factory=list)

    def part_of(self, task: str) -> Tasks:
        return next(part for part in self.parts if task in part.train or task in part.test)

    def is_own(self) -> bool:
        return any(part.is_own() for part in self.parts)

    def record(self) -> dict:
        own: dict[str, str] = {}
        for part in self.parts:
            own |= part.record().get("own_tasks", {})
        return {"own_tasks": own} if own else {}

    def seen(self, own_tasks: dict[str, str]) -> list[str]:
        return [task for part in self.parts for task in part.seen(own_tasks)]

    def pool(self, task: str) -> list[dict]:
        return self.part_of(task).pool(task)

    def training_hash(self) -> str:
        return " ".join(part.training_hash() for part in self.parts)

    def size(self, task: str) -> int:
        return self.part_of(task).size(task)

    def draw(self, rng: np.random.Generator, k: int, queries: int) -> tuple[str, list[dict], list[dict]]:
        trained = [part for part in self.parts if part.train]
        return trained[rng.integers(len(trained))].draw(rng, k, queries)

    def limit(self, task: str, limit_of: Callable[[list[dict]], int]) -> int:
        return self.part_of(task).limit(task, limit_of)

    def files(self, task: str, seed: int) -> dict[str, list[dict]]:
        return self.part_of(task).files(task, seed)

    def partner(self, task: str, among: list[str]) -> str:
        own = self.part_of(task)
        same = [t for t in among if t in own.test]
        return own.partner(task, same) if len(same) > 1 else super().partner(task, among)

    def retrieval_files(self, task: str) -> list[Path]:
        return self.part_of(task).retrieval_files(task)

    def retrieval_pool(self, task: str, seed: int) -> list[dict]:
        return self.part_of(task).retrieval_pool(task, seed)

    def data_hash(self, task: str, seed: int, retrieval: bool = False) -> str:
        return self.part_of(task).data_hash(task, seed, retrieval)


def tasks_of(args: argparse.Namespace, split: str | None = None) -> Tasks:
    """load_tasks of a script's flags, or of another split; that of own tasks takes its place in args."""
    own = {name: getattr(args, name, None) for name in ("train_tasks", "test_tasks", "columns")}
    asked = split or args.split
    check((asked in ("class_to_class", FUNCTIONS) or not {*args.tasks} <= MADE,
           f"--split {asked} has no part in made tasks; leave it out"))
    tasks = load_tasks(args.tasks, asked, args.llm, getattr(args, "k", 16), own)
    check((bool(tasks.test), f"--tasks {' '.join(args.tasks)} leaves no meta-test task to evaluate on; leave "
                             "one out of training, with --test-tasks"))
    if "split" in args and split is None:
        args.split = tasks.split if tasks.is_own() else args.split
    return tasks


def load_tasks(spec: str | list[str], split: str, llm: str = "", k: int = 16,
               own: dict[str, list[str] | None] | None = None) -> Tasks:
    """Find the tasks of a split: from the assets (bigbench), the hub (metaicl), a folder in MetaICL's layout,
    made ones (functions, early, recall: sets of k pairs of words of `llm`'s vocabulary), one's own
    (sources/own.py, which takes `own`), or several of these.

    The split `functions` has no meta-training tasks; its meta-test tasks are the folders FAMILY-FUNCTION here
    of the families that splits.json names for it.
    """
    names = [spec] if isinstance(spec, str) else spec
    if len(names) > 1:
        from sources.own import require_named
        parts = [load_tasks(name, split, llm, k, (own or {}) | {"strict": False}) for name in names]
        here = [task for part in parts if part.is_own() for task in part.places]
        require_named(here, " ".join(names), split, own or {})
        return mixture(parts, split)
    spec = names[0]
    if spec in MADE:
        from sources import synthetic
        made = {"functions": lambda: synthetic.Functions(k), "early": synthetic.Early,
                "recall": lambda: synthetic.Recall(Tokenizer(llm), k)}
        return made[spec]()
    table = json.loads((ROOT / "splits.json").read_text())
    if spec == "bigbench":
        folder, fix = common.ASSETS / "bigbench", "run `make assets`"
        assets.ensure(folder)
    else:
        folder = hub_tasks() if spec == "metaicl" else Path(spec)
        fix = "give metaicl, bigbench, or a folder or file of your own tasks"
    here = {path.name for path in folder.iterdir() if path.is_dir()} if folder.is_dir() else set()
    known = {name for collection in table.values() for name in collection["task_type"]}
    if spec not in ("bigbench", "metaicl") and split != FUNCTIONS and (
            not here & known or split.endswith(".json") or any((own or {}).values())):
        from sources.own import load_own
        return load_own(spec, split, k, **(own or {}))
    check((folder.is_dir(), f"--tasks {spec}: {folder} does not exist; {fix}"),
          (split in table["metaicl"]["settings"] or split == FUNCTIONS,
           f"--split {split} is of your own tasks, and --tasks {spec} is none; give a folder"))
    collection = max(("metaicl", "bigbench"), key=lambda c: len(here & table[c]["task_type"].keys()))
    if split == FUNCTIONS:
        collection, families = "bigbench", tuple(f"{family}-" for family in table["bigbench"]["functions"])
        names = sorted(name for name in here if name.startswith(families))
        setting, types = {"train": [], "test": names}, dict.fromkeys(names, "multi-choice")
    else:
        setting, types = table[collection]["settings"][split], table[collection]["task_type"]
    train = [t for t in setting["train"] if (folder / t / f"{t}_16384_100_train.jsonl").exists()]
    test = [t for t in setting["test"] if any((folder / t).glob(f"{t}_16_*_test.jsonl"))]
    if not test or (not train and split != FUNCTIONS):
        name = [*setting["train"], "list_functions-c001"][0]
        part = "16384_100_train" if setting["train"] else "16_100_test"
        raise UserError(f"--tasks {spec} has {len(train)} of {len(setting['train'])} meta-train and "
                        f"{len(test)} of {len(setting['test'])} meta-test tasks of {split}; expected folders "
                        f"such as {folder}/{name}/{name}_{part}.jsonl")
    # DEVIATION: MetaICL lists sick in meta-train and meta-test of non_nli_to_nli; it is not trained on.
    train = [t for t in train if t not in setting["test"]]
    return Tasks(folder, collection, split, train, test, [t for t in setting["train"] if t not in train],
                 [t for t in setting["test"] if t not in test], types)


def mixture(parts: list[Tasks], split: str) -> Mixture:
    """Several collections in one; its split is own tasks' only where no part has one of the paper's."""
    lists = {name: [task for part in parts for task in getattr(part, name)]
             for name in ("train", "test", "missing_train", "missing_test")}
    types = {task: kind for part in parts for task, kind in part.types.items()}
    here = [task for p in parts for task in {*p.train, *p.test}]
    twice = [task for task, n in Counter(here).items() if n > 1]
    check((not twice, f"--tasks: {', '.join(twice[:3])} stands in two collections; rename one"))
    if all(p.is_own() or p.collection in MADE for p in parts):
        split = next((p.split for p in parts if p.is_own()), split)
    return Mixture(Path(), " ".join(p.collection for p in parts), split, **lists, types=types, parts=parts)


def hub_tasks() -> Path:
    """MetaICL's tasks from the hub, written once to the cache in MetaICL's own layout."""
    folder = common.CACHE / f"metaicl-{HUB_REVISIONS[HUB_TASKS][:12]}"
    if folder.is_dir():
        return folder
    common.CACHE.mkdir(parents=True, exist_ok=True)
    with held(common.CACHE, "the cache", wait=True):  # another process may be fetching them
        if not folder.is_dir():
            fetch_hub_tasks(folder)
    return folder


def fetch_hub_tasks(folder: Path) -> None:
    """Write MetaICL's tasks of the hub into `folder`, which appears when it is whole."""
    columns = ("task", "input", "output", "options", "seed", "split")
    temporary = temporary_of(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    stems = {"meta_train": "16384_100_train", "meta_eval": "16_{seed}_{split}",
             "meta_eval_100shot": "100_{seed}_{split}"}
    try:
        for split, stem in stems.items():
            rows = hub_rows("--tasks metaicl", HUB_TASKS, split=split, columns=columns)
            for row in tqdm(rows, desc=f"MetaICL {split}"):
                name, stem_of = row["task"], stem.format(**row)
                check((is_plain_name(name) and is_plain_name(stem_of),
                       f"--tasks metaicl: the hub's data name a task {str(name)[:60]!r} with a file "
                       f"{stem_of[:60]!r}, which are no plain names; nothing was kept"))
                (temporary / name).mkdir(parents=True, exist_ok=True)
                with (temporary / name / f"{name}_{stem_of}.jsonl").open("a") as file:
                    file.write(json.dumps({k: row[k] for k in ("task", "input", "output", "options")}) + "\n")
        with contextlib.suppress(OSError):  # another rank was first
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_plain_name(name) -> bool:
    """Whether a name from elsewhere can be that of a file in its folder, and of no other place."""
    return isinstance(name, str) and re.fullmatch(r"\w[\w.:+-]{0,99}", name, re.ASCII) is not None


def read_examples(path: Path) -> list[dict]:
    """Lines {"task", "input", "output", "options"} of a MetaICL file; options may be empty."""
    check((path.is_file(), f"{path} does not exist; expected MetaICL's <task>/<task>_16_<seed>_test.jsonl"))
    examples = []
    for where, row in json_lines(path, form := '{"task", "input", "output", "options"}'):
        try:
            options = row.get("options") or []
            if not isinstance(options, list):
                raise TypeError(f"options are a {type(options).__name__}, not a list of texts")
            example = Example(task=row["task"], input=row["input"].strip(), output=row["output"].strip(),
                              options=[option.strip() for option in options])
            example.where = where
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{where}: expected {form} ({type(error).__name__}: {error})") from error
        check((example["input"] and example["output"], f"{where}: the input or the output is empty"))
        examples.append(example)
    check((bool(examples), f"{path} is empty; give at least one line, such as {form}"))
    return examples


def require_scorable(tasks: Tasks, only: list[str] | None, seeds: Sequence[int], limit: int = 0) -> None:
    """Raise one UserError for all names of --only that are no meta-test task, and for all meta-test tasks (of
    --only, where given) whose first `limit` queries (0: all) of a seed are none, or cannot be scored."""
    check(*((name in tasks.test, f"--only {name} is no meta-test task of {tasks.split} here; "
             f"{did_you_mean(name, tasks.test)}") for name in only or []))
    faults = []
    for task in only or tasks.test:
        try:
            for seed in seeds:
                queries = tasks.files(task, seed)["test"][:limit or None]
                check((bool(queries), f"task {task} has no queries for seed {seed}; give another --k"))
                require_options(queries)
        except UserError as error:
            faults.append(str(error))
    hint = "; or name the other tasks with --only or --test-tasks" * (len(faults) < len(only or tasks.test))
    check((not faults, "; ".join(faults[:5]) + "; ..." * bool(faults[5:]) + hint))


def require_options(examples: list[dict], ids_of: Callable[[str], list[int]] | None = None) -> None:
    """Raise UserError for the first example that cannot be scored: its answer is not among its options, or,
    by the token ids of an answer, an option is nothing to the LLM, or the same as another text. (The same
    text twice, as in commonsense_qa, is one answer, whichever of them wins.)"""
    known: dict[str, tuple[int, ...]] = {}
    for e in examples:
        fault = "" if e["output"] in e["options"] else "it has no options" if not e["options"] else \
            f"its answer {e['output']!r} is not among {e['options']}"
        seen: dict[tuple[int, ...], str] = {}
        for option in e["options"] if ids_of and not fault else []:
            if option not in known:
                known[option] = tuple(ids_of(option))
            if not known[option]:
                fault = f"its option {option!r} becomes no token"
            elif seen.setdefault(known[option], option) != option:
                fault = f"its options {seen[known[option]]!r} and {option!r} become the same tokens"
        if fault:
            line = getattr(e, "where", None)
            raise UserError((f"{line}, " if line else "") + f"task {e['task']}: the example "
                            f"{e['input'][:60]!r} cannot be scored, as {fault}; Eq. (1) compares given "
                            "options, so use a classification or multiple-choice task, whose options differ")


def rng_of(task: str, seed: int) -> np.random.Generator:
    """The random numbers of a task and a seed."""
    return np.random.default_rng((seed, zlib.crc32(task.encode())))


def shuffled(examples: list[dict], task: str, seed: int) -> list[dict]:
    """A task's examples in the order of a seed."""
    return [examples[i] for i in rng_of(task, seed).permutation(len(examples))]


def demonstration_set(tasks: Tasks, task: str, seed: int, k: int) -> tuple[list[dict], dict[str, list[dict]]]:
    """The first k training examples of (task, seed), and all its files."""
    files = tasks.files(task, seed)
    n = len(files["train"])
    check((n >= k, f"task {task} has {n} training examples for seed {seed}, and --k is {k}; give less"))
    return files["train"][:k], files
