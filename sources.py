"""Where tokens come from: tokenizers, text and tasks, from files or the hub (Sec. 4.1). No tensors."""

import gzip
import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import AutoTokenizer

import common
from common import FUNCTIONS, ROOT, UserError, check, require_hub

SEEDS = (100, 13, 21, 42, 87)
HUB_TASKS, HUB_TEXT = "bigheiniuJ/EvalMetaICLAll", "allenai/c4"
HUB_REVISIONS = {  # of the data sets' repositories, so that a run reads what another one read
    HUB_TEXT: "1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
    HUB_TASKS: "main",  # not pinned: none of its commit hashes was known when this was written
}


class Tokenizer:
    """A hub or local tokenizer that adds no special tokens and reads text such as <|im_end|> as plain text.

    Byte-level BPE goes through tiktoken, which is faster; `reference` is always transformers' own way.
    """

    def __init__(self, name: str):
        try:
            self.hf = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise UserError(f"no tokenizer at {name}: {str(error).splitlines()[0]} Give the hub name or the "
                            "folder of a model; the pocket preset's comes from `make assets`, and T5's needs "
                            "the packages sentencepiece and protobuf") from error
        self.name = name
        first = self.hf("a")["input_ids"][:1]
        self.bos_id = first[0] if first and first[0] == self.hf.bos_token_id else None
        self.hf.backend_tokenizer.encode_special_tokens = True
        self.fingerprint = hashlib.sha256(self.hf.backend_tokenizer.to_str().encode()).hexdigest()[:12]
        self.encoding, self.to_id = tiktoken_encoding(self.hf.backend_tokenizer.to_str())
        self.lead = self.reference("a")

    def reference(self, text: str) -> list[int]:
        return self.hf.backend_tokenizer.encode(text, add_special_tokens=False).ids

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens; one that starts with white space goes on another."""
        if self.encoding is None and text[:1].isspace():
            # behind a letter, where SentencePiece does not put a space of its own before the text's
            return self.reference("a" + text)[len(self.lead):]
        if self.encoding is None:
            return self.reference(text)
        ids = self.to_id[self.encoding.encode_ordinary(text)] if text else ()
        return [int(i) for i in ids if i >= 0]  # transformers too drops a byte that the vocabulary lacks


def tiktoken_encoding(tokenizer_json: str):
    """A tiktoken Encoding from a byte-level BPE tokenizer's vocabulary, and the array from its ranks to ids.

    (None, None) where the tokenizer is of another kind. Ranks are the bytes, then the merges in their order.
    """
    import tiktoken
    spec = json.loads(tokenizer_json)
    pattern = split_pattern(spec.get("pre_tokenizer") or {})
    plain_added = [t for t in spec.get("added_tokens", []) if not t["special"]]  # matched before all others
    if spec["model"].get("type") != "BPE" or spec.get("normalizer") or pattern is None or plain_added:
        return None, None
    vocab, merges = spec["model"]["vocab"], spec["model"]["merges"]
    # byte-level BPE writes each byte as one printable character: printable Latin-1 stands for itself
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    characters = {**{chr(b): b for b in printable}, **{chr(256 + i): b for i, b in enumerate(rest)}}
    ranks, to_id = {}, np.full(256 + len(merges), -1, dtype=np.int64)
    for character, byte in characters.items():
        ranks[bytes([byte])] = byte
        to_id[byte] = vocab.get(character, -1)
    for i, merge in enumerate(merges):
        token = "".join(merge.split(" ") if isinstance(merge, str) else merge)
        as_bytes = bytes(characters[c] for c in token)
        if as_bytes not in ranks:
            ranks[as_bytes] = 256 + i
            to_id[256 + i] = vocab[token]
    return tiktoken.Encoding("own", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}), to_id


def split_pattern(pre: dict) -> str | None:
    """The regular expression by which a pre-tokenizer splits text; None for one that is not understood."""
    gpt2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    single_digits = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
    steps = pre.get("pretokenizers", [pre])
    kinds = [step.get("type") for step in steps]
    if not steps or kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    own_regex = steps[-1].get("use_regex", True)
    if kinds == ["ByteLevel"] and own_regex:
        return gpt2
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and own_regex:
        return single_digits
    return steps[0]["pattern"].get("Regex") if kinds == ["Split", "ByteLevel"] and not own_regex else None


def corpus_files(corpus: list[str]) -> list[Path]:
    """The files that --corpus names: sotu from the assets, folders, or files."""
    files = []
    for name in corpus:
        path = common.ASSETS / "sotu" if name == "sotu" else Path(name)
        if not path.exists():
            fix = "run `make assets`" if name == "sotu" else "give c4, sotu, a folder, .jsonl[.gz] or .txt"
            raise UserError(f"--corpus {name}: {path} does not exist; {fix}")
        found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        files += [p for p in found if p.name.endswith((".jsonl", ".jsonl.gz", ".json.gz", ".txt"))]
    check((bool(files), f"--corpus {' '.join(corpus)} holds no .jsonl, .jsonl.gz or .txt file"))
    return files


def json_lines(path: Path, expected: str) -> Iterator[tuple[str, dict]]:
    """(file and line, as an error names them; object) of each line of a .jsonl[.gz] file that is not blank.

    Raises:
        UserError: the file cannot be read as UTF-8; a line is not the object that was `expected` there.
    """
    number = 0
    try:
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise TypeError(f"found a {type(row).__name__}")
                    yield f"{path}, line {number}", row
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text ({error}); save it so, or "
                        "fetch it again") from error
    except (TypeError, ValueError, RecursionError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}, line {number}: expected {expected} ({what})") from error


def read_documents(files: list[Path], characters: int) -> Iterator[str]:
    """Documents of text files: a line's "text" in .jsonl; in .txt, paragraphs joined up to `characters`."""
    for path in files:
        if path.suffix == ".txt":
            passage = ""
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path} cannot be read as UTF-8 text ({error}); save it so") from error
            for paragraph in re.split(r"\n\s*\n|\n", text):
                passage = f"{passage}\n{paragraph}".strip()
                if len(passage) >= characters:
                    yield passage
                    passage = ""
            if passage:
                yield passage
            continue
        for where, row in json_lines(path, form := 'a JSON object with a "text" as in C4'):
            check((isinstance(row.get("text"), str), f"{where}: expected {form} (found {str(row)[:60]})"))
            yield row["text"]


def hub_rows(flag: str, name: str, *subset: str, split: str, columns: tuple[str, ...]) -> Iterator[dict]:
    """Rows of one split of a data set on the hub, streamed, at its revision in HUB_REVISIONS.

    Raises:
        UserError, naming the offline way: no hub, no such revision, a broken connection, other columns.
    """
    import datasets
    require_hub(flag)
    revision, given = HUB_REVISIONS[name], flag.split()[1]
    try:
        for row in datasets.load_dataset(name, *subset, split=split, streaming=True, revision=revision):
            if missing := [column for column in columns if column not in row]:
                raise KeyError(f"no column {missing[0]} among {sorted(row)}")
            yield row
    except Exception as error:  # each of the libraries below has errors of its own
        what = str(error).partition("\n")[0]
        raise UserError(f"{flag}: {name}, revision {revision}, split {split} cannot be read from the hub "
                        f"({type(error).__name__}: {what}); try again, or without the hub give a local "
                        f"folder in place of {given}, or add --preset pocket after `make assets`") from error


def hub_documents() -> Iterator[str]:
    """C4 (en, validation) from the hub."""
    for row in hub_rows("--corpus c4", HUB_TEXT, "en", split="validation", columns=("text",)):
        yield row["text"]


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
        """Encoder.limit of a meta-training task's examples."""
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

    def data_hash(self, task: str, seed: int, retrieval: bool = False) -> str:
        """Content hash of the files that an evaluation of (task, seed) reads."""
        files = [*self.paths(task, seed).values(), *(self.retrieval_files(task) if retrieval else [])]
        return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


@dataclass
class Mixture(Tasks):
    """Several collections in one: training draws from each as often, evaluation goes through all."""

    parts: list[Tasks] = field(default_factory=list)

    def part_of(self, task: str) -> Tasks:
        return next(part for part in self.parts if task in part.types)

    def pool(self, task: str) -> list[dict]:
        return self.part_of(task).pool(task)

    def size(self, task: str) -> int:
        return self.part_of(task).size(task)

    def draw(self, rng: np.random.Generator, k: int, queries: int) -> tuple[str, list[dict], list[dict]]:
        return self.parts[rng.integers(len(self.parts))].draw(rng, k, queries)

    def limit(self, task: str, limit_of: Callable[[list[dict]], int]) -> int:
        return self.part_of(task).limit(task, limit_of)

    def files(self, task: str, seed: int) -> dict[str, list[dict]]:
        return self.part_of(task).files(task, seed)

    def partner(self, task: str, among: list[str]) -> str:
        own = self.part_of(task)
        return own.partner(task, [t for t in among if t in own.types])

    def retrieval_files(self, task: str) -> list[Path]:
        return self.part_of(task).retrieval_files(task)

    def data_hash(self, task: str, seed: int, retrieval: bool = False) -> str:
        return self.part_of(task).data_hash(task, seed, retrieval)


def load_tasks(spec: str | list[str], split: str, llm: str = "", k: int = 16) -> Tasks:
    """Find the tasks of a split: from the assets (bigbench), the hub (metaicl), a folder in MetaICL's layout,
    made ones (functions, early, recall: sets of k pairs of words of `llm`'s vocabulary), or several of these.

    The split `functions` has no meta-training tasks; its meta-test tasks are the folders FAMILY-FUNCTION here
    of the families that splits.json names for it.
    """
    names = [spec] if isinstance(spec, str) else spec
    if len(names) > 1:
        parts = [load_tasks(name, split, llm, k) for name in names]
        lists = {name: [task for part in parts for task in getattr(part, name)]
                 for name in ("train", "test", "missing_train", "missing_test")}
        types = {task: kind for part in parts for task, kind in part.types.items()}
        return Mixture(Path(), " ".join(p.collection for p in parts), split, **lists, types=types,
                       parts=parts)
    spec = names[0]
    if spec in ("functions", "early", "recall"):
        from pocket import synthetic
        made = {"functions": synthetic.Functions, "early": synthetic.Early,
                "recall": lambda: synthetic.Recall(Tokenizer(llm), k)}
        return made[spec]()
    table = json.loads((ROOT / "splits.json").read_text())
    if spec == "bigbench":
        folder, fix = common.ASSETS / "bigbench", "run `make assets`"
    else:
        folder = hub_tasks() if spec == "metaicl" else Path(spec)
        fix = "give metaicl, bigbench, or a folder in MetaICL's layout"
    check((folder.is_dir(), f"--tasks {spec}: {folder} does not exist; {fix}"))
    here = {path.name for path in folder.iterdir() if path.is_dir()}
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


def hub_tasks() -> Path:
    """MetaICL's tasks from the hub, written once to the cache in MetaICL's own layout."""
    folder = common.CACHE / f"metaicl-{HUB_REVISIONS[HUB_TASKS][:12]}"
    if folder.is_dir():
        return folder
    columns = ("task", "input", "output", "options", "seed", "split")
    temporary = common.CACHE / f"metaicl.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    stems = {"meta_train": "16384_100_train", "meta_eval": "16_{seed}_{split}",
             "meta_eval_100shot": "100_{seed}_{split}"}
    for split, stem in stems.items():
        rows = hub_rows("--tasks metaicl", HUB_TASKS, split=split, columns=columns)
        for row in tqdm(rows, desc=f"MetaICL {split}"):
            name = row["task"]
            (temporary / name).mkdir(parents=True, exist_ok=True)
            with (temporary / name / f"{name}_{stem.format(**row)}.jsonl").open("a") as file:
                file.write(json.dumps({k: row[k] for k in ("task", "input", "output", "options")}) + "\n")
    try:
        os.replace(temporary, folder)
    except OSError:  # another rank was first
        shutil.rmtree(temporary)
    return folder


def read_examples(path: Path) -> list[dict]:
    """Lines {"task", "input", "output", "options"} of a MetaICL file; options may be empty."""
    check((path.is_file(), f"{path} does not exist; expected MetaICL's <task>/<task>_16_<seed>_test.jsonl"))
    examples = []
    for where, row in json_lines(path, form := '{"task", "input", "output", "options"}'):
        try:
            example = {"task": row["task"], "input": row["input"].strip(), "output": row["output"].strip(),
                       "options": [option.strip() for option in row.get("options") or []]}
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{where}: expected {form} ({type(error).__name__}: {error})") from error
        check((example["input"] and example["output"], f"{where}: the input or the output is empty"))
        examples.append(example)
    return examples


def require_options(examples: list[dict]) -> None:
    """Raise UserError for the first example that cannot be scored: its answer is not among its options."""
    for e in examples:
        if e["output"] not in e["options"]:
            missing = f"its answer {e['output']!r} is not among {e['options']}"
            raise UserError(f"task {e['task']}: the example {e['input'][:60]!r} cannot be scored, as "
                            f"{missing if e['options'] else 'it has no options'}; Eq. (1) compares "
                            "given options, so use a classification or multiple-choice task")


def demonstration_set(tasks: Tasks, task: str, seed: int, k: int) -> tuple[list[dict], dict[str, list[dict]]]:
    """The first k training examples of (task, seed), and all its files."""
    files = tasks.files(task, seed)
    n = len(files["train"])
    check((n >= k, f"task {task} has {n} training examples for seed {seed}, and --k is {k}; give less"))
    return files["train"][:k], files
