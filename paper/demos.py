"""Which demonstrations a set holds, and what is done to them: retrieval and perturbation (Sec. 5.2, Table 3).

    python evaluate.py --methods icl --retrieve bm25
    python evaluate.py --methods icl mend --checkpoint out/fine --perturb wrong_label

Both only change the list of examples; everything after it (lengths, tokens, vectors, scoring) is the same as
for demonstrations drawn at random, and the same for the LLM that reads them and for the distiller.
"""

import zlib
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel

from common import UserError, autocast, check
from data import MAX_INPUT, Formatter, collate
from model import demo_prefix, vector_prefix
from score import VECTOR_METHODS, demo_tokens, score_options
from sources.hub import require_model
from sources.tasks import Tasks, demonstration_set
from sources.text import Tokenizer

PERTURBATIONS = ("no_label", "no_input", "random_label", "wrong_label")

# --------------------------------------------------------------------------------------------------
# Perturbation


def has_labels(examples: list[dict]) -> bool:
    """Whether random and wrong labels mean something: every example has at least two options."""
    return all(len(set(e["options"])) > 1 for e in examples)


def perturb(examples: list[dict], kind: str, seed: int) -> list[dict]:
    """Sec. 5.2, negative perturbations: a function of (task, seed), so that every method reads the same ones.

    Args:
        kind: no_label (inputs alone), no_input (labels alone), random_label (uniform over the example's
            options), or wrong_label (uniform over its options but the right one).
    """
    rng = np.random.default_rng((seed, zlib.crc32(examples[0]["task"].encode())))
    changed = []
    for example in examples:
        options = sorted(set(example["options"]))
        if kind == "no_label":
            changed.append(example | {"output": ""})
        elif kind == "no_input":
            changed.append(example | {"input": ""})
        else:
            labels = options if kind == "random_label" else [o for o in options if o != example["output"]]
            changed.append(example | {"output": labels[rng.integers(len(labels))]})
    return changed


# --------------------------------------------------------------------------------------------------
# Retrieval: for each query the K nearest examples of a pool.
# DEVIATION: the paper does not give their order. Here the nearest stands first, since what passes the context
# limit is dropped from the end of a set.


def bm25_neighbours(pool: list[str], queries: list[str], k: int) -> np.ndarray:
    """The k texts of `pool` of highest BM25 score a query, ties in pool order: (queries, k) indices."""
    import bm25s  # only here: where JAX is installed it takes most of a GPU's memory on import
    pool_words, query_words = (bm25s.tokenize(texts, return_ids=False, show_progress=False)
                               for texts in (pool, queries))
    scores = np.zeros((len(queries), len(pool)))
    if any(pool_words):  # bm25s cannot index texts without a single word
        index = bm25s.BM25()
        index.index(pool_words, show_progress=False)
        for i, words in enumerate(query_words):
            scores[i] = index.get_scores(words) if words else 0
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def dense_neighbours(pool: list[str], queries: list[str], k: int,
                     embed: Callable[[list[str]], Tensor]) -> np.ndarray:
    """The k texts of `pool` of highest cosine similarity of `embed` a query: (queries, k) indices."""
    similarity = embed(queries) @ embed(pool).T                                         # (queries, pool)
    return similarity.argsort(dim=1, descending=True, stable=True)[:, :k].cpu().numpy()


class SentenceEncoder:
    """Texts to unit vectors: the mean of a model's final hidden states over a text's tokens.

    DEVIATION: the paper does not name its dense retriever. Without a name the frozen LLM itself is taken.
    """

    def __init__(self, name: str | None, llm, tokenizer: Tokenizer):
        if name is None:
            self.encode = tokenizer.encode
            self.backbone = llm.get_encoder() if llm.config.is_encoder_decoder else llm.base_model
            return
        require_model("--dense-model", name)
        hf = Tokenizer(name).hf  # with the special tokens that its model was trained with, such as BERT's
        self.encode = lambda text: hf(text, truncation=True, max_length=MAX_INPUT)["input_ids"]
        try:
            self.backbone = AutoModel.from_pretrained(name, trust_remote_code=False).to(llm.device).eval()
        except (OSError, ValueError) as error:
            raise UserError(f"--dense-model {name} cannot be loaded ({str(error).splitlines()[0]}); give an "
                            "encoder's hub name or folder, or leave the flag out to use the LLM "
                            "itself") from error

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> Tensor:
        """(n, width) fp32 on the CPU, each row of length 1."""
        ids = [self.encode(text)[:MAX_INPUT] or [0] for text in texts]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # little padding
        vectors: list[Tensor] = [torch.empty(0)] * len(ids)
        for start in range(0, len(order), 16):
            rows = order[start:start + 16]
            padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids[i]) for i in rows], batch_first=True)
            mask = torch.arange(padded.shape[1])[None] < torch.tensor([len(ids[i]) for i in rows])[:, None]
            device = self.backbone.device
            states = self.backbone(input_ids=padded.to(device),
                                   attention_mask=mask.long().to(device)).last_hidden_state
            weights = mask[:, :, None].to(device)
            mean = (states.float() * weights).sum(dim=1) / weights.sum(dim=1)           # (n, width)
            for i, vector in zip(rows, torch.nn.functional.normalize(mean, dim=1).cpu(), strict=True):
                vectors[i] = vector
        return torch.stack(vectors)


def perturbable(args, tasks: Tasks) -> list[str]:
    """The tasks to evaluate; those where random and wrong labels mean nothing are left out, aloud."""
    names = args.only or tasks.test
    if args.perturb not in ("random_label", "wrong_label"):
        return names
    kept = [t for t in names
            if all(has_labels(demonstration_set(tasks, t, seed, args.k)[0]) for seed in args.seeds)]
    if left_out := sorted(set(names) - set(kept)):
        print(f"note: --perturb {args.perturb} means nothing without at least two options; left out: "
              f"{', '.join(left_out)}")
    check((bool(kept), f"--perturb {args.perturb}: no task has options in its demonstrations; give others"))
    return kept


def retrieve(kind: str, pool: list[dict], queries: list[dict], k: int,
             encoder: SentenceEncoder | None) -> list[list[dict]]:
    """Sec. 5.2, positive perturbation: each query's own demonstrations.

    Args:
        kind: bm25 or dense. pool: candidates, none of which has a query's input.
    Returns:
        for each query k examples of the pool, by similarity of the inputs, the nearest first.
    """
    if len(pool) <= k:
        raise UserError(f"task {queries[0]['task']}: {len(pool)} examples to retrieve from, and --k is {k}, "
                        "which leaves no choice; give less")
    texts, asked = [e["input"] for e in pool], [q["input"] for q in queries]
    rows = bm25_neighbours(texts, asked, k) if kind == "bm25" else dense_neighbours(texts, asked, k, encoder)
    return [[pool[i] for i in row] for row in rows]


SET_TOKENS = 4096  # in one pass where each query has demonstrations of its own


@torch.no_grad()
def predict_each(method: str, sets: list[list[dict]], limit: int, llm, distiller, formatter: Formatter,
                 queries: list[dict], args) -> list[str]:
    """As score.predict, but with a demonstration set for each query, sets[i] for queries[i]: rows of similar
    length are read together, SET_TOKENS or so at a time."""
    rows = [{"demo": demo_tokens(method, demos, limit, formatter), "queries": [formatter.scoring_query(q)]}
            for demos, q in zip(sets, queries, strict=True)]
    lengths = [len(row["demo"]) + len(x) + sum(map(len, options))
               for row in rows for x, options in row["queries"]]
    order, chosen = sorted(range(len(rows)), key=lambda i: lengths[i]), [""] * len(rows)
    head = formatter.turns.head
    while order:
        n = max(1, min(len(order), SET_TOKENS // lengths[order[-1]]))
        group, order = order[-n:], order[:-n]
        batch = collate([rows[i] for i in group], llm.device)
        if method in VECTOR_METHODS:
            with autocast(llm.device, args.dtype):
                vectors = distiller(batch["demo_ids"], batch["demo_mask"], 1, head)         # (B, l, d)
            prefix = vector_prefix(llm, vectors, head)
        else:
            prefix = demo_prefix(llm, batch["demo_ids"], batch["demo_mask"], head)
        best = score_options(llm, prefix, batch)[:, 0].argmax(dim=1).tolist()               # (B,)
        for i, option in zip(group, best, strict=True):
            chosen[i] = queries[i]["options"][option]
    return chosen
