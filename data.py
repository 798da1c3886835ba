"""Text and tasks: what becomes demonstrations D, query x and answer y, and how a batch of them looks.

    python data.py --split class_to_class                        # Table 1 for what is on disk
    python data.py --split class_to_class --show 1               # one example's whole way from file to batch
    python data.py --split hr_to_lr --tasks FOLDER               # the same for a folder in MetaICL's layout

Covers Sec. 3.2 (what is sampled in either stage), Sec. 4.1 (Table 1) and App. A (lengths) of the paper.

A batch, the same in both stages and in scoring, is a dictionary of tensors; a row is one demonstration set
with the queries that share it, packed side by side:

    demo_ids    (B, T_d) long   demonstration tokens, padded on the left
    demo_mask   (B, T_d) bool   True at demonstration tokens
    part_ids, part_mask   (B S, T_s)   the same as the distiller reads them: each row cut into S segments
    used        (B S, l) bool   with --elastic in training: True for the row's own l, the last ones of all
    query_ids   (B, T)   long   query and answer tokens, padded on the right
    query_mask  (B, T)   bool   True at query and answer tokens
    query       (B, T)   long   which of the row's queries a token belongs to: 0, 1, ...
    branch      (B, T)   long   0 in the query x; o + 1 in its answer option o (in training: 1 in the answer
                                y; in pretraining 1 in all of x, which is what the LLM predicts there)
    position    (B, T)   long   position after the prefix: 0, 1, ...; every option starts where x ends
    predictor   (B, T)   long   whose state predicts this token: 0 = the last prefix token, 1 + c = column c
"""

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import torch

import common
import sources.text
from common import UserError, check, run_main
from sources.tasks import Tasks
from sources.template import make_turns
from sources.text import Tokenizer, cached_tokens, corpus_files, hub_documents, read_documents

MAX_INPUT = 256          # tokens of an x, cut at the end (App. A). DEVIATION: of a query's too
TOGETHER = 64            # steps whose samples are dealt out by length


class Corpus:
    """Windows of pretraining text: the first `window` tokens of each document, tokenised once, into a file.

    DEVIATION: the paper both "extracts sequences of 1024 tokens" and "truncates each passage to 1024"; here a
    shorter document, of at least min_doc_len tokens, stays and is split at beta of its own length.

    Every 20th usable document is held out from training. Raises UserError when no document is long enough.
    """

    def __init__(self, corpus: list[str], tokenizer: Tokenizer, window: int, min_doc_len: int):
        files = None if corpus == ["c4"] else corpus_files(corpus)
        characters = 5 * window
        digest = hashlib.sha256(f"{tokenizer.fingerprint} {characters}".encode())
        if files is None:
            digest.update(sources.text.HUB_REVISIONS[sources.text.HUB_TEXT].encode())
        for path in files or []:
            digest.update(path.name.encode("utf-8", "surrogateescape") + path.read_bytes())
        self.name = " ".join(Path(name).name for name in corpus)
        self.hash = digest.hexdigest()[:12]
        folder = common.CACHE / f"corpus-{self.hash}"
        documents = hub_documents if files is None else lambda: read_documents(files, characters)
        self.tokens, ends = cached_tokens(folder, documents, tokenizer)
        starts = np.concatenate([[0], ends[:-1]])
        usable = np.flatnonzero(ends - starts >= min_doc_len)
        if len(usable) < 20:
            longest = int((ends - starts).max()) if len(ends) else 0
            raise UserError(f"--corpus {self.name}: {len(usable)} of {len(ends)} documents have at least "
                            f"{min_doc_len} tokens (the longest has {longest}), and 20 are needed; lower "
                            "--window (as .txt is joined up to that) or --min-doc-len, or give more text")
        self.spans = np.stack([starts[usable], np.minimum(ends[usable], starts[usable] + window)], axis=1)
        held_out = np.arange(len(usable)) % 20 == 0
        self.train, self.held_out = np.flatnonzero(~held_out), np.flatnonzero(held_out)

    def row(self, document: int, beta: float) -> dict:
        """The first beta of a window as demonstrations D, the rest as x (Sec. 3.2), for `collate`.

        x takes the place of an answer after an empty query: like an answer it is what the LLM predicts (and
        what an encoder-decoder writes), from its first token on.
        """
        start, end = self.spans[document]
        ids = self.tokens[start:end].tolist()
        cut = min(max(1, round(beta * len(ids))), len(ids) - 2)
        return {"demo": ids[:cut], "starts": list(range(0, cut, 16)), "queries": [([], [ids[cut:]])]}

    def training_rows(self, seed: int, first: int, count: int, beta: float) -> list[dict]:
        """Samples number first, first + 1, ... of endless passes over shuffled documents, by the seed."""
        n, rows = len(self.train), []
        for sample in range(first, first + count):
            order = np.random.default_rng((seed, sample // n)).permutation(n)
            rows.append(self.row(self.train[order[sample % n]], beta))
        return rows


@dataclass
class Formatter:
    """Turns examples into token ids by one template, within the length rules of App. A."""

    tokenizer: Tokenizer
    template: str
    context_len: int                        # demonstration tokens at most (App. A: 900)
    distill_len: int = 0
    llm_positions: int | None = None        # longest input of either model; None: no absolute limit
    distiller_positions: int | None = None
    segments: int | str = 1                 # D is distilled in so many; auto: as its length demands
    max_segments: int = 1                   # of a training step

    def __post_init__(self):
        self.turns = make_turns(self.template, self.tokenizer)

    def limit(self, examples: list[dict]) -> int:
        """Tokens that a task's demonstrations may take: `context_len`, but never so many that a query would
        not fit after them. By all of a task's labels, so that demonstrations never depend on the query.

        DEVIATION: the paper says 900, which GPT-2's 1,024 positions cannot hold.

        Raises:
            UserError: a query, or a single demonstration token, would not fit beside l vectors.
        """
        n = self.max_segments * self.distill_len
        limits = [self.context_len, self.room(examples, max(self.context_len, n))]
        if self.distiller_positions is not None:
            limits.append(self.distiller_positions - self.distill_len)
        check((n <= limits[1], f"--distill-len is {self.distill_len}, and a query with a label of task "
               f"{examples[0]['task']} leaves the LLM {limits[1]} positions for {n} vectors; give less"),
              (min(limits) >= 1, f"--distill-len {self.distill_len} leaves no position for D; give less"))
        return min(limits)

    def room(self, examples: list[dict], needed: int) -> int:
        """Positions that the LLM has left for what stands before a query; fewer, but `needed` at least, where
        so many are there by far: then no label has to be encoded."""
        left = (self.llm_positions or 1 << 20) - MAX_INPUT - len(self.turns.head + self.turns.tail)
        labels = {label for e in examples for label in (e["output"], *e["options"])}
        least = left - 16 * max(len((self.turns.reply + label).encode()) for label in labels)  # tokens a byte
        return least if least >= needed else left - max(len(self.answer(label)) for label in labels)

    def shown(self, example: dict, first: bool = False) -> list[int]:
        """x, with the separator that joins it to what stands before (unless `first`); its first MAX_INPUT."""
        before = self.turns.opening if first else self.turns.between
        return self.turns.encode(before + example["input"])[:MAX_INPUT]

    def query(self, example: dict, first: bool = False) -> list[int]:
        """x that is asked: with the tail after it, in a chat the end of the user's turn."""
        return self.shown(example, first) + self.turns.tail

    def answer(self, text: str) -> list[int]:
        """y after a query, with the separator before it; never cut."""
        return self.turns.encode(self.turns.reply + text) if text else []

    def label(self, text: str) -> list[int]:
        """y_i in a demonstration, likewise. Nothing at all for a label that was taken away."""
        return self.turns.encode(self.turns.before_answer + text) if text else []

    def demonstration(self, example: dict, first: bool) -> list[int]:
        """(x_i, y_i); without an input its answer alone, after what separates demonstrations."""
        if example["input"]:
            return self.shown(example, first) + self.label(example["output"])
        return self.turns.encode((self.turns.alone if first else self.turns.bare) + example["output"])

    def pieces(self, examples: list[dict], limit: int) -> list[tuple[dict, list[int]]]:
        """Whole demonstrations with their ids, up to the first that would pass `limit` tokens (one that is
        too long even alone is skipped)."""
        kept, size = [], 0
        for example in examples:
            piece = self.demonstration(example, first=not kept)
            if size + len(piece) <= limit:
                kept.append((example, piece))
                size += len(piece)
            elif kept:
                break
        if not kept:
            more = "raise --context-len" if limit >= self.context_len else "take an LLM of more positions"
            raise UserError(f"task {examples[0]['task']}: not one of {len(examples)} demonstrations fits "
                            f"into {limit} tokens; shorten them, or {more}")
        return kept

    def fitting(self, examples: list[dict], limit: int) -> list[dict]:
        """The demonstrations that `limit` tokens hold, or so many in each of --segments."""
        return [example for part in self.parts(examples, limit) for example, _ in part]

    def demonstrations(self, examples: list[dict], limit: int) -> list[int]:
        """D = concat(x_1, y_1, ..., x_K, y_K) of those that `limit` tokens hold."""
        return flat(self.pieces(examples, limit))

    def parts(self, examples: list[dict], limit: int) -> list[list[tuple[dict, list[int]]]]:
        """`pieces`, in the --segments that are distilled one by one, each of `limit` tokens at most.
        DEVIATION: the paper's D is what one context holds.

        Raises:
            UserError: no such cut is there, or the LLM has no positions for the vectors of so many segments.
        """
        if self.segments == 1:
            return [self.pieces(examples, limit)]
        pieces = [p for p in self.pieces(examples, limit * len(examples)) if len(p[1]) <= limit]
        parts: list[list] = [[]]
        if self.segments == "auto":
            for piece in pieces:
                parts += [[]] if len(flat([*parts[-1], piece])) > limit else []
                parts[-1].append(piece)
        else:
            parts = [pieces[i:j] for i, j in pairwise(even(len(pieces), self.segments))]
        longest, n = max(len(flat(part)) for part in parts), max(1, self.distill_len)
        fit = self.room(examples, len(parts) * n) // n
        check((all(parts) and longest <= limit, f"--segments {self.segments}: {len(pieces)} demonstrations "
               f"give segments of up to {longest} tokens, for 1 to {limit}; give auto or another number"),
              (len(parts) <= fit, f"{len(parts)} segments of {self.distill_len} vectors, and the LLM has "
               f"positions for {fit}; give a smaller l, longer segments or fewer demonstrations"))
        return parts

    def budget(self, examples: list[dict], limit: int) -> list[int]:
        """The baseline of equal length: those of the K demonstrations, in order, that fit into `limit` = l
        tokens; where none does, the shortest with its input cut at the end, so that its label stands."""
        ids: list[int] = []
        for example in examples:
            piece = self.demonstration(example, first=not ids)
            if len(ids) + len(piece) <= limit:
                ids += piece
        if ids:
            return ids
        shortest = min(examples, key=lambda e: len(self.demonstration(e, first=True)))
        y = self.label(shortest["output"])[:limit]
        return self.shown(shortest, first=True)[:limit - len(y)] + y

    def training_query(self, query: dict) -> tuple[list[int], list[list[int]]]:
        """A query and its answer, for `collate`."""
        return self.query(query), [self.answer(query["output"])]

    def scoring_query(self, query: dict, first: bool = False) -> tuple[list[int], list[list[int]]]:
        """A query with all its options, for `collate`; `first` where no demonstrations stand before it."""
        return self.query(query, first), [self.answer(option) for option in query["options"]]


def flat(pieces: list[tuple[dict, list[int]]]) -> list[int]:
    """The tokens of `Formatter.pieces` in a row."""
    return [token for _, ids in pieces for token in ids]


def sample_row(tasks: Tasks, formatter: Formatter, seed: int, sample: int, k: int, queries: int,
               least_k: int | None = None) -> dict:
    """Sec. 3.2: draw a meta-training task, then K + `queries` different examples of it; the first K become D.

    least_k: draw K between this and `k` first. A function of (seed, sample). DEVIATION: the paper has one K.
    """
    rng = np.random.default_rng((seed, sample))
    k = int(rng.integers(least_k, k + 1)) if least_k else k
    task, demos, asked = tasks.draw(rng, k, queries)
    pieces = formatter.pieces(demos, tasks.limit(task, formatter.limit))
    return {"demo": flat(pieces), "starts": [0, *accumulate(len(ids) for _, ids in pieces[:-1])],
            "queries": [formatter.training_query(query) for query in asked]}


def batches_by_length(rows: list[dict], batch_size: int, rng: np.random.Generator) -> list[list[dict]]:
    """Deal rows out into batches of similar length, in random order: by the length of their demonstrations
    and, within groups of four batches, by that of their queries. Padding falls from some 40% to under 10%.

    DEVIATION: the paper's batches are drawn at random. Here the samples are, and similar lengths meet.
    """
    def query_len(row: dict) -> int:
        return sum(len(x) + sum(map(len, options)) for x, options in row["queries"])

    rows, batches = sorted(rows, key=lambda row: len(row["demo"])), []
    for i in range(0, len(rows), 4 * batch_size):
        group = sorted(rows[i:i + 4 * batch_size], key=query_len)
        batches += [group[j:j + batch_size] for j in range(0, len(group), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def step_rows(draw: Callable[[int, int], list], seed: int, per_step: int) -> Callable[[int], list[dict]]:
    """What gives the `per_step` rows of a training step, as a function of (seed, step).

    draw(first, count) returns samples number first, first + 1, ...; those of TOGETHER steps are drawn at once
    and dealt out by length, so each sample is still seen exactly once.
    """
    @functools.lru_cache(maxsize=1)
    def bucket(number: int) -> list[list[dict]]:
        rows = draw(number * TOGETHER * per_step, TOGETHER * per_step)
        return batches_by_length(rows, per_step, np.random.default_rng((seed, number, 1)))

    return lambda step: bucket(step // TOGETHER)[step % TOGETHER]


def even(n: int, parts: int) -> list[int]:
    """Where n things are cut into so many runs of equal length, nearly: parts + 1 places from 0 to n."""
    return [n * i // parts for i in range(parts + 1)]


def padded_left(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids as (B, T) long, and where they are, (B, T) bool."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], dtype=torch.long)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(width)[None] >= width - lengths[:, None]


def collate(rows: list[dict], device: torch.device | str = "cpu",
            segments: int = 1) -> dict[str, torch.Tensor]:
    """Rows {"demo": ids, "queries": [(x ids, [option ids, ...]), ...]} to the batch described at the top.

    segments: S, where every row has so many starts of demonstrations ("starts"), else as many as all have.
    """
    demo_ids, demo_mask = padded_left([row["demo"] for row in rows])
    part_ids, part_mask, S = demo_ids, demo_mask, 1
    if segments > 1:
        S = min(segments, *(len(row["starts"]) for row in rows))
        cuts = [[*(row["starts"][i] for i in even(len(row["starts"]), S)[:-1]), None] for row in rows]
        part_ids, part_mask = padded_left([row["demo"][i:j] for row, at in zip(rows, cuts, strict=True)
                                           for i, j in pairwise(at)])
    columns = []
    for row in rows:
        tokens = []  # (id, query, branch, position, predictor)
        for s, (x, options) in enumerate(row["queries"]):
            tokens += [(t, s, 0, i, len(tokens) + i if i else 0) for i, t in enumerate(x)]
            end_of_x = len(tokens)
            for o, option in enumerate(options):
                start = len(tokens)
                tokens += [(t, s, o + 1, len(x) + i, start + i if i else end_of_x if x else 0)
                           for i, t in enumerate(option)]
        columns.append(torch.tensor(tokens, dtype=torch.long).view(-1, 5))
    packed = torch.nn.utils.rnn.pad_sequence(columns, batch_first=True)                           # (B, T, 5)
    lengths = torch.tensor([len(c) for c in columns])
    query_mask = torch.arange(packed.shape[1])[None] < lengths[:, None]                              # (B, T)
    batch = {"demo_ids": demo_ids, "demo_mask": demo_mask, "part_ids": part_ids, "part_mask": part_mask,
             "query_mask": query_mask}
    if "length" in rows[0]:
        batch["used"] = padded_left([[0] * row["length"] for row in rows for _ in range(S)])[1]
    batch |= {name: packed[:, :, i].contiguous()
              for i, name in enumerate(("query_ids", "query", "branch", "position", "predictor"))}
    pinned = torch.device(device).type == "cuda"
    return {n: (t.pin_memory() if pinned else t).to(device, non_blocking=pinned) for n, t in batch.items()}


if __name__ == "__main__":
    from paper.collection import main
    run_main(main)
