"""Where text comes from: tokenizers, files and the hub. No tensors."""

import contextlib
import copy
import functools
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from huggingface_hub import try_to_load_from_cache
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import common
from common import UserError, check
from sources import assets
from sources.files import content_hash, held, whole, write_whole
from sources.hub import require_hub

HUB_TASKS, HUB_TEXT = "bigheiniuJ/EvalMetaICLAll", "allenai/c4"
HUB_REVISIONS = {  # of the data sets' repositories, so that a run reads what another one read
    HUB_TEXT: "1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
    HUB_TASKS: "main",  # not pinned: none of its commit hashes was known when this was written
}


def first_line(error: BaseException) -> str:
    """An error's kind and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


class Tokenizer:
    """A hub or local tokenizer that adds no special tokens and reads text such as <|im_end|> as plain text.

    Byte-level BPE goes through tiktoken, which is faster; `reference` is always transformers' own way.

    name: of a model or its folder; or a tokenizer of transformers, which is copied.
    """

    def __init__(self, name: str | PreTrainedTokenizerBase):
        loaded = copy.deepcopy(name) if isinstance(name, PreTrainedTokenizerBase) else None
        name = loaded.name_or_path if loaded else name
        assets.ensure(name)
        try:
            self.hf = loaded or AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            backend = self.hf.backend_tokenizer  # ByT5's has none
        except Exception as error:  # a broken file can break any of the libraries below
            raise UserError(f"no tokenizer at {name} ({first_line(error)}). Give the hub name or the folder "
                            "of a model; the pocket preset's comes from `make assets`, and T5's needs "
                            "the packages sentencepiece and protobuf") from error
        self.name = name
        first = self.hf("a")["input_ids"][:1]
        self.bos = first if first and first[0] == self.hf.bos_token_id else []
        backend.encode_special_tokens = True
        self.fingerprint = hashlib.sha256(backend.to_str().encode()).hexdigest()[:12]
        self.encoding, self.to_id = tiktoken_encoding(backend.to_str())
        self.lead = self.reference("a")

    def reference(self, text: str) -> list[int]:
        return self.hf.backend_tokenizer.encode(text, add_special_tokens=False).ids

    def encode(self, text: str, after: bool = False) -> list[int]:
        """Token ids of a text, without special tokens; one that starts with white space goes on another, and
        so does any that stands `after` one."""
        if self.encoding is None and text[:1].isspace():
            # after a letter, where SentencePiece does not put a space of its own before the text's
            return self.reference("a" + text)[len(self.lead):]
        if self.encoding is None and after:  # a letter would join a letter; the end of a line does not
            return self.reference("\n" + text)[len(self.reference("\n")):]
        if self.encoding is None:
            return self.reference(text)
        ids = self.to_id[self.encoding.encode_ordinary(text)] if text else ()
        return [int(i) for i in ids if i >= 0]  # transformers too drops a byte that the vocabulary lacks


def check_same_tokens(distiller: str, llm: str) -> None:
    """Raise UserError, naming tokens, unless each that text becomes has the same id in both vocabularies."""
    def tokens(name: str, flag: str) -> dict[str, int]:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            return tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
        except Exception as error:
            raise UserError(f"{flag} {name} has no tokenizer beside it ({first_line(error)}), and "
                            "both models' are compared: give whole ones, or --distiller layers:N") from error
    own, other = tokens(llm, "--llm"), tokens(distiller, "--distiller")
    differ = sorted((t for t in own.keys() | other.keys() if own.get(t) != other.get(t)),
                    key=lambda t: (own.get(t, other.get(t)), t))
    named = ", ".join(f"{t!r} ({own.get(t, 'not there')} in the LLM's, {other.get(t, 'not there')} in the "
                      "distiller's)" for t in differ[:3])
    check((not differ, f"--distiller {distiller} does not share the tokenizer of --llm {llm}: {len(differ)} "
           f"tokens differ, such as {named}; give a smaller model with its tokenizer, or layers:N"))


def model_hashes(name: str) -> dict[str, str]:
    """Hashes of the weights and the tokenizer of a model's folder or hub name; {} where it has no files."""
    cached = try_to_load_from_cache(name, "config.json") if name and not Path(name).is_dir() else None
    folder = Path(cached).parent if isinstance(cached, str) else Path(name)
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not name or not files:
        return {}
    stamp = tuple((path, path.stat().st_mtime_ns, path.stat().st_size) for path in folder.glob("*.*"))
    return hashes_of(name, tuple(files), stamp)


def llm_hash(name: str) -> str:
    """A model's hashes in one word, for results."""
    return "/".join(model_hashes(name).values())


@functools.lru_cache(maxsize=2)
def hashes_of(name: str, files: tuple[Path, ...], stamp: tuple) -> dict[str, str]:
    """`model_hashes` of these files; `stamp` is what changes when one of them does."""
    hashes = {"weights_hash": content_hash(list(files))}
    with contextlib.suppress(UserError):  # a model without a tokenizer
        hashes["tokenizer_hash"] = Tokenizer(name).fingerprint
    return hashes


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
        assets.ensure(path)
        if not path.exists():
            fix = "run `make assets`" if name == "sotu" else "give c4 alone" if name == "c4" else \
                "give c4, sotu, a folder, .jsonl[.gz] or .txt"
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
        opened = gzip.open if path.suffix.lower() == ".gz" else open
        with opened(path, "rt", encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line)
                    if "\\ud" in line.lower():  # half of a pair of \\u escapes is no text
                        json.dumps(row, ensure_ascii=False).encode()
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


def cached_tokens(folder: Path, documents: Callable[[], Iterator[str]],
                  tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of all documents, uint32, and where each document ends: those in `folder` where they are
    whole, by their hash, else made anew."""
    found = read_tokens(folder)
    if found is None:
        folder.mkdir(parents=True, exist_ok=True)
        with held(folder, "the cache", wait=True):  # another process may be making them
            found = read_tokens(folder)
            if found is None:
                write_tokens(folder, documents(), tokenizer)
    return found or read_tokens(folder)


def read_tokens(folder: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """What `write_tokens` wrote; None unless it is there and whole."""
    try:
        about = json.loads((folder / "about.json").read_text())
        tokens = np.memmap(folder / "tokens.bin", dtype=np.uint32, mode="r")
        ends = np.frombuffer((folder / "ends.bin").read_bytes(), dtype=np.int64)
        digest = hashlib.sha256(tokens)
        digest.update(ends)
        return (tokens, ends) if about == {"sha256": digest.hexdigest()} else None
    except (OSError, ValueError):
        return None


def write_tokens(folder: Path, documents: Iterator[str], tokenizer: Tokenizer) -> None:
    """Tokenise documents into folder/tokens.bin (uint32), ends.bin (each document's end, int64) and the hash
    of both."""
    ends, total, digest = [], 0, hashlib.sha256()
    with whole(folder / "tokens.bin") as temporary, temporary.open("wb") as file:
        for text in tqdm(documents, desc="tokenising", unit=" documents"):
            ids = np.asarray(tokenizer.encode(text), dtype=np.uint32)
            file.write(ids.tobytes())
            digest.update(ids.tobytes())
            total += len(ids)
            ends.append(total)
        if not total:
            raise UserError('the corpus holds no text at all; give .jsonl lines with a "text", or .txt files')
    ends = np.asarray(ends, dtype=np.int64).tobytes()
    digest.update(ends)
    write_whole(folder / "ends.bin", ends)
    write_whole(folder / "about.json", json.dumps({"sha256": digest.hexdigest()}))
