"""Text and tasks: what becomes demonstrations D, query x and answer y, and how a batch of them looks.

    python data.py --split class_to_class                        # Table 1 for what is on disk
    python data.py --split class_to_class --show 1               # one example's whole way from file to batch
    python data.py --split hr_to_lr --tasks FOLDER               # the same for a folder in MetaICL's layout

Covers Sec. 3.2 (what is sampled in either stage), Sec. 4.1 (Table 1) and App. A (lengths) of the paper.

A batch, the same in both stages and in scoring, is a dictionary of tensors; a row is one demonstration set with the
queries that share it, packed side by side:

    demo_ids    (B, T_d) long   demonstration tokens, padded on the left
    demo_mask   (B, T_d) bool   True at demonstration tokens
    query_ids   (B, T)   long   query and answer tokens, padded on the right
    query_mask  (B, T)   bool   True at query and answer tokens
    segment     (B, T)   long   which of the row's queries a token belongs to: 0, 1, ...
    branch      (B, T)   long   0 in the query x; o + 1 in its answer option o (in training: 1 in the answer y; in
                                pretraining 1 in all of x, which is what the LLM predicts there)
    position    (B, T)   long   position behind the prefix: 0, 1, ...; every option starts where x ends
    predictor   (B, T)   long   the column whose state predicts this token: 0 = the last prefix token, 1 + c = column c
"""

import argparse
import functools
import gzip
import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import (
    ASSETS,
    CACHE,
    FUNCTIONS,
    ROOT,
    UserError,
    add_shared_flags,
    check,
    finish,
    parse,
    require_hub,
    run_main,
    shared_rules,
)

MAX_INPUT = 256          # tokens of an input x; longer ones are cut at the end (App. A)
SEEDS = (100, 13, 21, 42, 87)
TEMPLATES = {  # before an answer; between demonstrations (before the first one without its leading white space)
    "space": (" ", " "), "newline": ("\n", "\n\n\n"),
    "input-output": ("\nOutput: ", "\nInput: ")}
HUB_TASKS, HUB_TEXT = "bigheiniuJ/EvalMetaICLAll", "allenai/c4"
HUB_REVISIONS = {  # of the data sets' repositories, so that a run reads what another one read
    HUB_TEXT: "1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
    HUB_TASKS: "main",  # not pinned: none of its commit hashes was known when this was written
}

# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer


class Tokenizer:
    """A hub or local tokenizer that never adds special tokens and reads text such as <|im_end|> as plain text.

    Byte-level BPE goes through tiktoken, which is faster; `reference` is always transformers' own way.
    """

    def __init__(self, name: str):
        from transformers import AutoTokenizer
        try:
            self.hf = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise UserError(f"no tokenizer at {name}: {str(error).splitlines()[0]} Give the hub name or the folder of a "
                            "model; the pocket preset's comes from `make assets`, and T5's needs the packages sentencepiece "
                            "and protobuf") from error
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
        """Token ids of a text, without special tokens; a text that starts with white space is one that goes on."""
        if self.encoding is None and text[:1].isspace():
            # behind a letter, where SentencePiece does not put a space of its own before the text's
            return self.reference("a" + text)[len(self.lead):]
        if self.encoding is None:
            return self.reference(text)
        ids = self.to_id[self.encoding.encode_ordinary(text)] if text else ()
        return [int(i) for i in ids if i >= 0]  # a byte that the vocabulary lacks is dropped, as transformers does


def tiktoken_encoding(tokenizer_json: str):
    """A tiktoken Encoding from a byte-level BPE tokenizer's own vocabulary, and the array tiktoken rank -> token id.

    (None, None) where the tokenizer is of another kind. Ranks are the bytes, then the merges in their order.
    """
    import tiktoken
    spec = json.loads(tokenizer_json)
    pattern = split_pattern(spec.get("pre_tokenizer") or {})
    plain_added = [t for t in spec.get("added_tokens", []) if not t["special"]]  # transformers would match these first
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
    return tiktoken.Encoding("own-vocabulary", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}), to_id


def split_pattern(pre: dict) -> str | None:
    """The regular expression by which a pre-tokenizer splits text; None for one that is not understood."""
    gpt2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    single_digits = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
    steps = pre.get("pretokenizers", [pre])
    kinds = [step.get("type") for step in steps]
    if not steps or kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return gpt2
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1].get("use_regex", True):
        return single_digits
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True) and "Regex" in steps[0]["pattern"]:
        return steps[0]["pattern"]["Regex"]
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Pretraining text


def corpus_files(corpus: list[str]) -> list[Path]:
    """The files that --corpus names: sotu from the assets, folders, or files."""
    files = []
    for name in corpus:
        path = ASSETS / "sotu" if name == "sotu" else Path(name)
        if not path.exists():
            fix = "run `make assets`" if name == "sotu" else "give c4, sotu, a folder or files (.jsonl, .jsonl.gz, .txt)"
            raise UserError(f"--corpus {name}: {path} does not exist; {fix}")
        found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        files += [p for p in found if p.name.endswith((".jsonl", ".jsonl.gz", ".json.gz", ".txt"))]
    if not files:
        raise UserError(f"--corpus {' '.join(corpus)} holds no .jsonl, .jsonl.gz or .txt file")
    return files


def json_lines(path: Path, expected: str) -> Iterator[tuple[str, dict]]:
    """(file and line, as an error names them; object) of each line of a .jsonl or .jsonl.gz file that is not blank.

    Raises:
        UserError: the file cannot be read as UTF-8; a line is not the object that was `expected` there.
    """
    number = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise TypeError(f"found a {type(row).__name__}")
                    yield f"{path}, line {number}", row
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text ({error}); save it as UTF-8, or fetch it again") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}, line {number}: expected {expected} ({type(error).__name__}: {error})") from error


def read_documents(files: list[Path], characters: int) -> Iterator[str]:
    """Documents of text files: a line's "text" in .jsonl; in .txt, paragraphs joined up to `characters`."""
    for path in files:
        if path.suffix == ".txt":
            passage = ""
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path} cannot be read as UTF-8 text ({error}); save it as UTF-8") from error
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


def hub_rows(flag: str, name: str, *configuration: str, split: str, columns: tuple[str, ...]) -> Iterator[dict]:
    """Rows of one split of a data set on the hub, streamed, at its revision in HUB_REVISIONS.

    Raises UserError, naming the offline way, for whatever goes wrong on the way: no hub, no such revision, a broken
    connection, other columns than expected.
    """
    import datasets
    require_hub(flag)
    offline = f"give a local folder in place of {flag.split()[1]}, or add --preset pocket after `make assets`"
    try:
        for row in datasets.load_dataset(name, *configuration, split=split, streaming=True, revision=HUB_REVISIONS[name]):
            missing = [column for column in columns if column not in row]
            if missing:
                raise KeyError(f"no column {missing[0]} among {sorted(row)}")
            yield row
    except Exception as error:  # each of the libraries below has errors of its own
        what = str(error).partition("\n")[0]
        raise UserError(f"{flag}: {name}, revision {HUB_REVISIONS[name]}, split {split} cannot be read from the hub "
                        f"({type(error).__name__}: {what}); try again, or without the hub {offline}") from error


def hub_documents() -> Iterator[str]:
    """C4 (en, validation) from the hub."""
    for row in hub_rows("--corpus c4", HUB_TEXT, "en", split="validation", columns=("text",)):
        yield row["text"]


class Corpus:
    """Windows of pretraining text: the first `window` tokens of each document, tokenised once into a memory-mapped file.

    DEVIATION: the paper both "extracts sequences of 1024 tokens" and "truncates each passage to 1024"; here a shorter
    document, of at least min_doc_len tokens, stays and is split at beta of its own length.

    Every 20th usable document is held out from training. Raises UserError when no document is long enough.
    """

    def __init__(self, corpus: list[str], tokenizer: Tokenizer, window: int, min_doc_len: int):
        files = None if corpus == ["c4"] else corpus_files(corpus)
        characters = 5 * window
        digest = hashlib.sha256(f"{tokenizer.fingerprint} {characters}".encode())
        if files is None:
            digest.update(HUB_REVISIONS[HUB_TEXT].encode())
        for path in files or []:
            digest.update(path.name.encode() + path.read_bytes())
        self.name = " ".join(Path(name).name for name in corpus)
        self.hash = digest.hexdigest()[:12]
        folder = CACHE / f"corpus-{self.hash}"
        if not (folder / "ends.npy").exists():
            documents = hub_documents() if files is None else read_documents(files, characters)
            write_tokens(folder, documents, tokenizer)
        self.tokens = np.memmap(folder / "tokens.bin", dtype=np.uint32, mode="r")
        ends = np.load(folder / "ends.npy")
        starts = np.concatenate([[0], ends[:-1]])
        usable = np.flatnonzero(ends - starts >= min_doc_len)
        if len(usable) < 20:
            longest = int((ends - starts).max()) if len(ends) else 0
            raise UserError(f"--corpus {self.name}: {len(usable)} of {len(ends)} documents have at least {min_doc_len} "
                            f"tokens (the longest has {longest}), and 20 are needed; lower --min-doc-len or give more text")
        self.spans = np.stack([starts[usable], np.minimum(ends[usable], starts[usable] + window)], axis=1)
        held_out = np.arange(len(usable)) % 20 == 0
        self.train, self.held_out = np.flatnonzero(~held_out), np.flatnonzero(held_out)

    def row(self, document: int, beta: float) -> dict:
        """The first beta of a window as demonstrations D, the rest as x (Sec. 3.2), for `collate`.

        x takes the place of an answer behind an empty query: like an answer it is what the LLM predicts (and what an
        encoder-decoder writes), from its first token on.
        """
        start, end = self.spans[document]
        ids = self.tokens[start:end].tolist()
        cut = min(max(1, round(beta * len(ids))), len(ids) - 2)
        return {"demo": ids[:cut], "queries": [([], [ids[cut:]])]}

    def training_rows(self, seed: int, first: int, count: int, beta: float) -> list[dict]:
        """Samples number first, first + 1, ... of an endless pass over shuffled documents: a function of the seed."""
        n, rows = len(self.train), []
        for sample in range(first, first + count):
            order = np.random.default_rng((seed, sample // n)).permutation(n)
            rows.append(self.row(self.train[order[sample % n]], beta))
        return rows


def write_tokens(folder: Path, documents: Iterator[str], tokenizer: Tokenizer) -> None:
    """Tokenise documents into folder/tokens.bin (uint32) and folder/ends.npy (each document's end)."""
    folder.mkdir(parents=True, exist_ok=True)
    ends, total = [], 0
    temporary = folder / f"tokens.{os.getpid()}.tmp"
    with temporary.open("wb") as file:
        for text in tqdm(documents, desc="tokenising", unit=" documents"):
            ids = np.asarray(tokenizer.encode(text), dtype=np.uint32)
            file.write(ids.tobytes())
            total += len(ids)
            ends.append(total)
    if not total:
        raise UserError('the corpus holds no text at all; give .jsonl lines with a "text", or .txt files')
    os.replace(temporary, folder / "tokens.bin")
    np.save(folder / f"ends.{os.getpid()}.tmp.npy", np.asarray(ends, dtype=np.int64))
    os.replace(folder / f"ends.{os.getpid()}.tmp.npy", folder / "ends.npy")  # last: its presence says "complete"


# ---------------------------------------------------------------------------------------------------------------------
# Tasks


@dataclass
class Tasks:
    """The tasks of one split that are on disk. `collection` is metaicl or bigbench, the table of splits.json in use."""

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
            examples = read_examples(self.folder / task / f"{task}_16384_100_train.jsonl")
            self.pools[task] = list({(e["input"], e["output"]): e for e in examples}.values())
        return self.pools[task]

    def draw(self, rng: np.random.Generator, k: int, queries: int) -> tuple[str, list[dict], list[dict]]:
        """A meta-training task, k of its examples as demonstrations, and `queries` others."""
        task = self.train[rng.integers(len(self.train))]
        pool = self.pool(task)
        chosen = [pool[i] for i in rng.choice(len(pool), k + queries, replace=False)]
        return task, chosen[:k], chosen[k:]

    def partner(self, task: str, among: list[str]) -> str:
        """Whose demonstrations are swapped in for a task's: half the list further on, as families stand together."""
        return among[(among.index(task) + len(among) // 2) % len(among)]

    def limit(self, task: str, encoder: "Encoder") -> int:
        """Encoder.limit of a meta-training task."""
        if task not in self.limits:
            self.limits[task] = encoder.limit(self.pool(task))
        return self.limits[task]

    def files(self, task: str, seed: int) -> dict[str, list[dict]]:
        """The train (demonstrations), dev and test examples of a meta-test task for one of MetaICL's seeds."""
        if not (self.folder / task / f"{task}_16_{seed}_test.jsonl").exists():
            raise UserError(f"{self.folder / task} has no files of seed {seed}; MetaICL's seeds are "
                            f"{', '.join(map(str, sorted(SEEDS)))}")
        return {part: read_examples(self.folder / task / f"{task}_16_{seed}_{part}.jsonl")
                for part in ("train", "dev", "test")}

    def retrieval_files(self, task: str) -> list[Path]:
        """Where demonstrations are retrieved from: the 100-shot training files, else those of all seeds."""
        return sorted((self.folder / task).glob(f"{task}_100_*_train.jsonl")) or \
            sorted((self.folder / task).glob(f"{task}_16_*_train.jsonl"))

    def retrieval_pool(self, task: str, seed: int) -> list[dict]:
        """Different examples to retrieve demonstrations from; none is in the seed's dev file or asks a test question."""
        files = self.files(task, seed)
        banned = {e["input"] for e in files["test"]} | {e["input"] for e in files["dev"]}
        examples = [e for path in self.retrieval_files(task) for e in read_examples(path) if e["input"] not in banned]
        return list({(e["input"], e["output"]): e for e in examples}.values())

    def data_hash(self, task: str, seed: int, retrieval: bool = False) -> str:
        """Content hash of the files that an evaluation of (task, seed) reads."""
        files = [self.folder / task / f"{task}_16_{seed}_{part}.jsonl" for part in ("train", "dev", "test")]
        digest = hashlib.sha256()
        for path in files + (self.retrieval_files(task) if retrieval else []):
            digest.update(path.read_bytes())
        return digest.hexdigest()[:12]


@dataclass
class Mixture(Tasks):
    """Several collections in one: training draws from each as often, evaluation goes through all."""

    parts: list[Tasks] = field(default_factory=list)

    def part_of(self, task: str) -> Tasks:
        return next(part for part in self.parts if task in part.types)

    def pool(self, task: str) -> list[dict]:
        return self.part_of(task).pool(task)

    def draw(self, rng: np.random.Generator, k: int, queries: int) -> tuple[str, list[dict], list[dict]]:
        return self.parts[rng.integers(len(self.parts))].draw(rng, k, queries)

    def limit(self, task: str, encoder: "Encoder") -> int:
        return self.part_of(task).limit(task, encoder)

    def files(self, task: str, seed: int) -> dict[str, list[dict]]:
        return self.part_of(task).files(task, seed)

    def partner(self, task: str, among: list[str]) -> str:
        own = self.part_of(task)
        return own.partner(task, [t for t in among if t in own.types])

    def retrieval_files(self, task: str) -> list[Path]:
        return self.part_of(task).retrieval_files(task)

    def retrieval_pool(self, task: str, seed: int) -> list[dict]:
        return self.part_of(task).retrieval_pool(task, seed)

    def data_hash(self, task: str, seed: int, retrieval: bool = False) -> str:
        return self.part_of(task).data_hash(task, seed, retrieval)


def load_tasks(spec: str | list[str], split: str, llm: str = "", k: int = 16) -> Tasks:
    """Find the tasks of a split: from the assets (bigbench), the hub (metaicl), a folder in MetaICL's layout, or made
    ones (functions, early, recall; recall makes its sets of k pairs from words of `llm`'s vocabulary); or of several.

    The split `functions` has no meta-training tasks; its meta-test tasks are the folders FAMILY-FUNCTION here
    of the families that splits.json names for it.
    """
    names = [spec] if isinstance(spec, str) else spec
    if len(names) > 1:
        parts = [load_tasks(name, split, llm, k) for name in names]
        lists = {name: [task for part in parts for task in getattr(part, name)]
                 for name in ("train", "test", "missing_train", "missing_test")}
        types = {task: kind for part in parts for task, kind in part.types.items()}
        return Mixture(Path(), " ".join(p.collection for p in parts), split, **lists, types=types, parts=parts)
    spec = names[0]
    if spec in ("functions", "early", "recall"):
        import synthetic
        made = {"functions": synthetic.Functions, "early": synthetic.Early,
                "recall": lambda: synthetic.Recall(Tokenizer(llm), k)}
        return made[spec]()
    table = json.loads((ROOT / "splits.json").read_text())
    if spec == "metaicl":
        folder = hub_tasks()
    else:
        folder = ASSETS / "bigbench" if spec == "bigbench" else Path(spec)
    if not folder.is_dir():
        fix = "run `make assets`" if spec == "bigbench" else "give metaicl, bigbench, or a folder in MetaICL's layout"
        raise UserError(f"--tasks {spec}: {folder} does not exist; {fix}")
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
        raise UserError(f"--tasks {spec} has {len(train)} of {len(setting['train'])} meta-train and {len(test)} of "
                        f"{len(setting['test'])} meta-test tasks of {split}; expected folders such as "
                        f"{folder}/{name}/{name}_{part}.jsonl")
    # DEVIATION: MetaICL lists sick in both the meta-train and the meta-test tasks of non_nli_to_nli; it is not trained on.
    train = [t for t in train if t not in setting["test"]]
    return Tasks(folder, collection, split, train, test, [t for t in setting["train"] if t not in train],
                 [t for t in setting["test"] if t not in test], types)


def hub_tasks() -> Path:
    """MetaICL's tasks from the hub, written once to the cache in MetaICL's own layout."""
    folder = CACHE / f"metaicl-{HUB_REVISIONS[HUB_TASKS][:12]}"
    if folder.is_dir():
        return folder
    columns = ("task", "input", "output", "options", "seed", "split")
    temporary = CACHE / f"metaicl.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    stems = {"meta_train": "16384_100_train", "meta_eval": "16_{seed}_{split}", "meta_eval_100shot": "100_{seed}_{split}"}
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
    if not path.is_file():
        raise UserError(f"{path} does not exist; expected MetaICL's layout, <task>/<task>_16_<seed>_test.jsonl")
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
    """Scoring needs options, and the gold answer among them: raise UserError for the first example without."""
    for example in examples:
        if example["output"] not in example["options"]:
            what = f"its answer {example['output']!r} is not among {example['options']}" if example["options"] else \
                "it has no options"
            raise UserError(f"task {example['task']}: the example {example['input'][:60]!r} cannot be scored, as {what}; "
                            "scoring compares given options (Eq. 1), so use a classification or multiple-choice task")


# ---------------------------------------------------------------------------------------------------------------------
# From examples to token ids


@dataclass
class Encoder:
    """Turns examples into token ids by one template, within the length rules of App. A."""

    tokenizer: Tokenizer
    template: str
    context_len: int                        # demonstration tokens at most (App. A: 900)
    distill_len: int = 0
    llm_positions: int | None = None        # longest input of either model; None where it has no absolute limit
    distiller_positions: int | None = None

    def __post_init__(self):
        newline = "\n" in TEMPLATES[self.template][0]
        if newline and self.tokenizer.encode("a\nb") in map(self.tokenizer.encode, ("a b", "ab")):
            raise UserError(f"--template {self.template}, but the tokenizer of {self.tokenizer.name} drops newlines, as T5's do; use "
                            "--template space")

    def limit(self, examples: list[dict]) -> int:
        """Tokens that a task's demonstrations may take: `context_len`, but never so many that one of its queries would
        not fit behind them. It looks at all of a task's labels, so that demonstrations never depend on the query.

        DEVIATION: the paper says 900, which GPT-2's 1,024 positions cannot hold.

        Raises:
            UserError: a query, or a single demonstration token, would not fit beside l vectors.
        """
        limits = [self.context_len]
        if self.distiller_positions is not None:
            limits.append(self.distiller_positions - self.distill_len)
        if self.llm_positions is not None:
            labels = {label for e in examples for label in [e["output"], *e["options"]]}
            longest = max(len(self.answer(label)) for label in labels)
            limits.append(self.llm_positions - MAX_INPUT - longest - (self.tokenizer.bos_id is not None))
            check((self.distill_len <= limits[-1], (f"--distill-len is {self.distill_len}, and the LLM's {self.llm_positions} "
                   f"positions leave {limits[-1]} beside a query; give less")))
        check((min(limits) >= 1, f"--distill-len {self.distill_len} leaves no position for demonstrations; give less"))
        return min(limits)

    def query(self, example: dict, first: bool = False) -> list[int]:
        """x, with the separator that joins it to what stands before (unless `first`); cut at its end to MAX_INPUT."""
        separator = TEMPLATES[self.template][1]
        return self.tokenizer.encode((separator.lstrip() if first else separator) + example["input"])[:MAX_INPUT]

    def answer(self, text: str) -> list[int]:
        """y, with the separator before it; never cut. Nothing at all for an empty text (a label that was taken away)."""
        return self.tokenizer.encode(TEMPLATES[self.template][0] + text) if text else []

    def demonstration(self, example: dict, first: bool) -> list[int]:
        """(x_i, y_i); without an input its answer stands alone, behind what separates demonstrations (unless `first`)."""
        if example["input"]:
            return self.query(example, first) + self.answer(example["output"])
        return self.tokenizer.encode(("" if first else TEMPLATES[self.template][1]) + example["output"])

    def pieces(self, examples: list[dict], limit: int) -> list[tuple[dict, list[int]]]:
        """Whole demonstrations with their ids: the first that would pass `limit` tokens and all after it are left out
        (one that is too long even alone is skipped)."""
        kept, size = [], 0
        for example in examples:
            piece = self.demonstration(example, first=not kept)
            if size + len(piece) <= limit:
                kept.append((example, piece))
                size += len(piece)
            elif kept:
                break
        if not kept:
            raise UserError(f"task {examples[0]['task']}: not one of {len(examples)} demonstrations fits into {limit} "
                            "tokens; raise --context-len, or shorten the demonstrations")
        return kept

    def fitting(self, examples: list[dict], limit: int) -> list[dict]:
        """The demonstrations that `limit` tokens hold."""
        return [example for example, _ in self.pieces(examples, limit)]

    def demonstrations(self, examples: list[dict], limit: int) -> list[int]:
        """D = concat(x_1, y_1, ..., x_K, y_K) of those that `limit` tokens hold."""
        return [token for _, piece in self.pieces(examples, limit) for token in piece]

    def budget(self, examples: list[dict], limit: int) -> list[int]:
        """The baseline of equal length: as many of the K demonstrations, in order, as fit into `limit` = l tokens.

        Where none fits, the shortest one with its input cut at the end, so that its label still stands.
        """
        ids: list[int] = []
        for example in examples:
            piece = self.demonstration(example, first=not ids)
            if len(ids) + len(piece) <= limit:
                ids += piece
        if ids:
            return ids
        shortest = min(examples, key=lambda e: len(self.demonstration(e, first=True)))
        answer = self.answer(shortest["output"])[:limit]
        return self.query(shortest, first=True)[:limit - len(answer)] + answer

    def training_query(self, query: dict) -> tuple[list[int], list[list[int]]]:
        """A query and its answer, for `collate`."""
        return self.query(query), [self.answer(query["output"])]

    def scoring_query(self, query: dict, first: bool = False) -> tuple[list[int], list[list[int]]]:
        """A query with all its options, for `collate`; `first` where no demonstrations stand before it."""
        return self.query(query, first), [self.answer(option) for option in query["options"]]


def sample_row(tasks: Tasks, encoder: Encoder, seed: int, sample: int, k: int, queries: int) -> dict:
    """Sec. 3.2: draw a meta-training task, then K + `queries` different examples of it; the first K become D.

    A function of (seed, sample).
    """
    task, demos, asked = tasks.draw(np.random.default_rng((seed, sample)), k, queries)
    return {"demo": encoder.demonstrations(demos, tasks.limit(task, encoder)),
            "queries": [encoder.training_query(query) for query in asked]}


def batches_by_length(rows: list[dict], batch_size: int, rng: np.random.Generator) -> list[list[dict]]:
    """Deal rows out into batches of similar length, in random order: by the length of their demonstrations and then,
    within groups of four batches, by that of their queries. Padding falls from some 40% of a batch to under 10%.

    DEVIATION: the paper's batches are drawn at random. Here the samples are, and those of similar length meet.
    """
    def query_len(row: dict) -> int:
        return sum(len(x) + sum(map(len, options)) for x, options in row["queries"])

    rows, batches = sorted(rows, key=lambda row: len(row["demo"])), []
    for i in range(0, len(rows), 4 * batch_size):
        group = sorted(rows[i:i + 4 * batch_size], key=query_len)
        batches += [group[j:j + batch_size] for j in range(0, len(group), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def step_rows(draw: Callable[[int, int], list[dict]], seed: int, per_step: int, steps: int = 64) -> Callable[[int], list[dict]]:
    """What gives the `per_step` rows of a training step, as a function of (seed, step).

    draw(first, count) returns samples number first, first + 1, ...; those of `steps` steps are drawn together and dealt
    out by length, so each sample is still seen exactly once.
    """
    @functools.lru_cache(maxsize=1)
    def bucket(number: int) -> list[list[dict]]:
        rows = draw(number * steps * per_step, steps * per_step)
        return batches_by_length(rows, per_step, np.random.default_rng((seed, number, 1)))

    return lambda step: bucket(step // steps)[step % steps]


def collate(rows: list[dict], device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """Rows {"demo": ids, "queries": [(x ids, [option ids, ...]), ...]} to the batch described at the top."""
    width = max(len(row["demo"]) for row in rows)
    demo_ids = torch.zeros(len(rows), width, dtype=torch.long)
    demo_mask = torch.zeros(len(rows), width, dtype=torch.bool)
    columns = []
    for b, row in enumerate(rows):
        demo_ids[b, width - len(row["demo"]):] = torch.tensor(row["demo"], dtype=torch.long)
        demo_mask[b, width - len(row["demo"]):] = True
        tokens = []  # (id, segment, branch, position, predictor)
        for s, (x, options) in enumerate(row["queries"]):
            tokens += [(t, s, 0, i, len(tokens) + i if i else 0) for i, t in enumerate(x)]
            end_of_x = len(tokens)
            for o, option in enumerate(options):
                start = len(tokens)
                tokens += [(t, s, o + 1, len(x) + i, start + i if i else end_of_x if x else 0) for i, t in enumerate(option)]
        columns.append(torch.tensor(tokens, dtype=torch.long).view(-1, 5))
    T = max(len(c) for c in columns)
    packed = torch.stack([torch.nn.functional.pad(c, (0, 0, 0, T - len(c))) for c in columns])        # (B, T, 5)
    lengths = torch.tensor([len(c) for c in columns])
    batch = {"demo_ids": demo_ids, "demo_mask": demo_mask, "query_mask": torch.arange(T)[None] < lengths[:, None]}
    batch |= {name: packed[:, :, i].contiguous()
              for i, name in enumerate(("query_ids", "segment", "branch", "position", "predictor"))}
    if torch.device(device).type == "cuda":
        return {name: t.pin_memory().to(device, non_blocking=True) for name, t in batch.items()}
    return batch


# ---------------------------------------------------------------------------------------------------------------------
# Looking at the data


def table1(tasks: Tasks, encoder: Encoder) -> dict:
    """Table 1: tasks, examples and the average length of a demonstration (of each task's first 200), for what is here."""
    figures = {}
    for part, names, missing in (("train", tasks.train, tasks.missing_train), ("test", tasks.test, tasks.missing_test)):
        lengths, examples = [], 0
        for task in tqdm(names, desc=f"meta-{part} tasks"):
            pool = tasks.pool(task) if part == "train" else tasks.files(task, SEEDS[0])["test"]
            examples += len(pool)
            lengths.append(np.mean([len(encoder.query(e)) + len(encoder.answer(e["output"])) for e in pool[:200]]))
        figures[part] = {"tasks": len(names), "of": len(names) + len(missing), "examples": examples,
                         "avg_len": round(float(np.mean(lengths)), 2) if lengths else 0.0, "missing": missing}
    return figures


def show(tasks: Tasks, encoder: Encoder, k: int) -> None:
    """Print one training example's whole way: line, text, tokens, batch with its masks."""
    task = tasks.train[0]
    pool = tasks.pool(task)
    check((len(pool) > k, f"task {task} has {len(pool)} examples, and --show {k} needs {k + 1}"))
    row = {"demo": encoder.demonstrations(pool[:k], encoder.limit(pool)), "queries": [encoder.training_query(pool[k])]}
    x, (y,) = row["queries"][0]
    decode = encoder.tokenizer.hf.decode
    print(f"line of the file:\n  {json.dumps(pool[k])}")
    for name, ids in (("demonstrations D", row["demo"]), ("query x", x), ("answer y", y)):
        print(f"{name}, {len(ids)} tokens:\n  text {decode(ids)!r}\n  ids  {ids}")
    for name, tensor in collate([row]).items():
        print(f"batch[{name!r}] {tuple(tensor.shape)}:\n  {tensor.long().tolist()[0]}")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shared_flags(parser)
    parser.add_argument("--show", type=int, metavar="K", help="show one example with K demonstrations instead of Table 1")
    return parser


def main(argv: list[str] | None = None) -> dict:
    args = parse(get_parser(), argv, {"paper": {}, "pocket": {}})
    check(*shared_rules(args), (args.show is None or args.show >= 1, f"--show is {args.show}; give at least 1"))
    tasks = load_tasks(args.tasks, args.split, args.llm, args.k)
    encoder = Encoder(Tokenizer(args.llm), args.template, context_len=900)
    if args.show:
        check((bool(tasks.train), f"--show needs a meta-training task, and {args.split} has none"))
        show(tasks, encoder, args.show)
        return finish({"split": args.split, "task": tasks.train[0]})
    figures = table1(tasks, encoder)
    for part in ("train", "test"):
        f = figures[part]
        print(f"meta-{part}: {f['tasks']:3d} of {f['of']:3d} tasks · {f['examples']:7d} examples · average length "
              f"{f['avg_len']:.2f} tokens" + (f" · missing: {', '.join(f['missing'])}" if f["missing"] else ""))
    return finish({"split": args.split, "collection": tasks.collection, **figures})


if __name__ == "__main__":
    run_main(main)
