"""Tests of demos.py: properties of perturbations over random examples, neighbours against brute force and by
hand."""

import copy
import json
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import sentence
from transformers import AutoModel

from common import UserError
from data import MAX_INPUT
from loading import load_llm
from paper.demos import (
    PERTURBATIONS,
    SentenceEncoder,
    bm25_neighbours,
    dense_neighbours,
    has_labels,
    perturb,
    retrieve,
)
from sources.text import Tokenizer


def random_examples(rng: random.Random, task: str = "t", shared: bool | None = None) -> list[dict]:
    """Examples with shared options (classification) or their own (multiple choice), some twice."""
    def options() -> list[str]:
        return [f"option {i}" for i in rng.sample(range(50), rng.randint(2, 6))]
    common_options = options()
    shared = rng.random() < 0.5 if shared is None else shared
    examples = []
    for i in range(rng.randint(1, 20)):
        own = common_options if shared else options()
        own = own + own[:rng.randint(0, 2)]
        examples.append({"task": task, "input": f"input {i}", "output": rng.choice(own),
                         "options": rng.sample(own, len(own))})
    return examples


@pytest.mark.parametrize("case", range(60))
def test_properties_of_every_perturbation(case):
    examples = random_examples(random.Random(case))
    before = copy.deepcopy(examples)
    found = {kind: perturb(examples, kind, case) for kind in PERTURBATIONS}
    assert examples == before  # the list that was given stays as it is
    assert found["no_label"] == [e | {"output": ""} for e in examples]
    assert found["no_input"] == [e | {"input": ""} for e in examples]
    for kind in ("random_label", "wrong_label"):
        # nothing else changes
        assert [e | {"output": 0} for e in found[kind]] == [e | {"output": 0} for e in examples]
        assert all(new["output"] in e["options"] for new, e in zip(found[kind], examples, strict=True))
        assert found[kind] == perturb(copy.deepcopy(examples), kind, case)
    assert all(new["output"] != e["output"] for new, e in zip(found["wrong_label"], examples, strict=True))
    # fewer demonstrations (Fig. 4a) get the labels that they have among more
    assert perturb(examples[:1], "wrong_label", case) == found["wrong_label"][:1]


@pytest.mark.parametrize("kind, labels", [("random_label", "abcd"), ("wrong_label", "acd")])
def test_labels_are_drawn_uniformly(kind, labels):
    """Counts over 3,000 seeds: chi-square below its 99.9% point for 3 degrees of freedom, 16.27."""
    examples = [{"task": "t", "input": "x", "output": "b", "options": ["a", "b", "c", "d", "a"]}
                for _ in range(3)]
    for position in (0, 2):
        counts = Counter(perturb(examples, kind, seed)[position]["output"] for seed in range(3000))
        expected = 3000 / len(labels)
        assert counts.keys() == set(labels)
        assert sum((n - expected) ** 2 / expected for n in counts.values()) < 16.27


def test_draws_follow_task_and_seed():
    def draws(task, seed, order=1):
        examples = [{"task": task, "input": "x", "output": "a", "options": list("abcdefgh")[::order]}
                    for _ in range(16)]
        return "".join(e["output"] for e in perturb(examples, "wrong_label", seed))
    assert len({draws(task, seed) for task in ("emo", "ag_news") for seed in (13, 21, 42, 87, 100)}) == 10
    assert draws("emo", 13, -1) == draws("emo", 13)  # whatever the order of the options
    np.random.seed(5), random.seed(5), torch.manual_seed(5)
    assert draws("emo", 13) == draws("emo", 13)
    assert len(set(draws("emo", 13))) > 3  # not one label for all


def test_labels_mean_something_only_with_two_different_options():
    def example(*options):
        return {"task": "t", "input": "x", "output": "a", "options": list(options)}
    assert has_labels([example("a", "b"), example("a", "b", "c")])
    assert not has_labels([example("a", "b"), example()])
    assert not has_labels([example("a", "a")])


def lucene_bm25(pool: list[str], query: str) -> list[float]:
    """sum over words of ln(1 + (N - df + 0.5) / (df + 0.5)) tf / (tf + k1 (1 - b + b len / mean))."""
    documents, n = [text.split() for text in pool], len(pool)
    mean = sum(map(len, documents)) / n
    scores = []
    for d in documents:
        score = 0.0
        for word in query.split():
            df, tf = sum(word in other for other in documents), d.count(word)
            idf, long = math.log(1 + (n - df + 0.5) / (df + 0.5)), 0.25 + 0.75 * len(d) / mean
            score += idf * tf / (tf + 1.5 * long)
        scores.append(score)
    return scores


POOL = ["river boat river", "cold river", "boat music bread war", "music", "cold cold cold boat", "letters"]


def test_bm25_by_hand():
    # mean length 15 / 6 = 2.5. river: df 2, idf ln(1 + 4.5 / 2.5) = 1.0296
    # river boat river: 2 / (2 + 1.5 (0.25 + 0.75 * 3 / 2.5)) = 0.5370
    # cold river: 1 / (1 + 1.5 (0.25 + 0.75 * 2 / 2.5)) = 0.4396
    assert lucene_bm25(POOL, "river")[:3] == pytest.approx([0.5529, 0.4526, 0.0], abs=1e-4)
    assert bm25_neighbours(POOL, ["river", "music"], 3).tolist() == [[0, 1, 2], [3, 2, 0]]
    # case, punctuation, function words
    assert bm25_neighbours(POOL, ["The RIVER, the river!"], 2).tolist() == [[0, 1]]


@pytest.mark.parametrize("seed", range(10))
def test_bm25_order_against_the_formula(seed):
    rng = random.Random(seed)
    words = ["river", "boat", "cold", "bread", "music", "war", "ships"]
    pool = [" ".join(rng.choices(words, k=rng.randint(1, 8))) for _ in range(30)]
    queries = [" ".join(rng.choices([*words, "unknown"], k=rng.randint(1, 5))) for _ in range(8)]
    for query, row in zip(queries, bm25_neighbours(pool, queries, 30), strict=True):
        scores = np.array(lucene_bm25(pool, query))
        assert sorted(row) == list(range(30)) and (np.diff(scores[row]) < 1e-5).all()


def test_equal_scores_stay_in_pool_order_and_texts_without_words_are_no_error():
    assert bm25_neighbours(["music", "boat", "music", "boat"], ["boat", "bread", "", "the"], 4).tolist() == [
        [1, 3, 0, 2], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert bm25_neighbours(["", "?!", "boat"], ["boat"], 2).tolist() == [[2, 0]]
    assert bm25_neighbours(["5 + 7", "a"], ["boat", "5"], 2).tolist() == [[0, 1], [0, 1]]


def test_dense_neighbours_against_brute_force():
    rng = np.random.default_rng(0)
    vectors = {f"{kind}{i}": v / np.linalg.norm(v) for kind in "pq"
               for i, v in enumerate(rng.normal(size=(25, 6)))}
    pool, queries = [f"p{i}" for i in range(25)], [f"q{i}" for i in range(5)]
    found = dense_neighbours(pool, queries, 7, lambda ts: torch.tensor(np.stack([vectors[t] for t in ts])))
    for query, row in zip(queries, found, strict=True):
        by_hand = sorted(range(25), key=lambda i: -float(vectors[query] @ vectors[f"p{i}"]))
        assert row.tolist() == by_hand[:7]
    same = dense_neighbours(["a", "b", "c"], ["q"], 3, lambda texts: torch.ones(len(texts), 2))
    assert same.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("own", [True, False])
def test_encoder_in_batches_equals_one_text_at_a_time(llm_folder, own):
    """Also of a model that is named, whose tokenizer may add special tokens."""
    llm, tokenizer = load_llm(str(llm_folder), torch.device("cpu"), torch.float32), Tokenizer(str(llm_folder))
    encoder = SentenceEncoder(None if own else str(llm_folder), llm, tokenizer)
    rng = random.Random(0)
    texts = [sentence(rng, rng.choice([1, 3, 9, 30])) for _ in range(40)] + ["", "boat " * 400]
    found = encoder(texts)
    backbone = AutoModel.from_pretrained(llm_folder, dtype=torch.float32).eval()
    for text, vector in zip(texts, found, strict=True):
        ids = tokenizer.reference(text)[:MAX_INPUT] or [0]
        with torch.no_grad():
            mean = backbone(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(dim=0)
        torch.testing.assert_close(vector, mean / mean.norm(), atol=1e-5, rtol=0)
    assert found.shape == (42, 32) and torch.allclose(found.norm(dim=1), torch.ones(42), atol=1e-6)
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_a_named_encoder_gets_its_own_special_tokens(llm_folder, tmp_path):
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast
    hf = PreTrainedTokenizerFast.from_pretrained(llm_folder)
    hf.backend_tokenizer.post_processor = TemplateProcessing(single="<|endoftext|> $A <|endoftext|>",
                                                             special_tokens=[("<|endoftext|>", 0)])
    AutoModel.from_pretrained(llm_folder).save_pretrained(tmp_path / "encoder")
    hf.save_pretrained(tmp_path / "encoder")
    llm, tokenizer = load_llm(str(llm_folder), torch.device("cpu"), torch.float32), Tokenizer(str(llm_folder))
    encoder = SentenceEncoder(str(tmp_path / "encoder"), llm, tokenizer)
    assert encoder.encode("cold river") == [0, *tokenizer.reference("cold river"), 0]
    assert len(encoder.encode("boat " * 400)) == MAX_INPUT and encoder.encode("boat " * 400)[-1] == 0
    assert SentenceEncoder(None, llm, tokenizer).encode("cold river") == tokenizer.reference("cold river")


def test_an_encoder_that_cannot_be_had(llama, tmp_path):
    llm, tokenizer = load_llm(str(llama), torch.device("cpu"), torch.float32), Tokenizer(str(llama))
    with pytest.raises(UserError,
                       match="--dense-model some/name would come from the model hub, which does not answer"):
        SentenceEncoder("some/name", llm, tokenizer)
    for file in llama.glob("token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    with pytest.raises(UserError,
                       match="--dense-model .* cannot be loaded .*leave the flag out to use the LLM itself"):
        SentenceEncoder(str(tmp_path), llm, tokenizer)


def test_retrieve_gives_each_query_its_nearest_examples_by_input():
    pool = [{"task": "t", "input": text, "output": str(i)} for i, text in enumerate(POOL)]
    queries = [{"task": "t", "input": "music", "output": "river river"},
               {"task": "t", "input": "river", "output": "music"}]
    assert retrieve("bm25", pool, queries, 2, None) == [[pool[3], pool[2]], [pool[0], pool[1]]]
    def letters(texts):  # cosine of letter counts
        rows = torch.tensor([[text.count(chr(97 + i)) for i in range(26)] for text in texts]).float()
        return torch.nn.functional.normalize(rows, dim=1)
    found = retrieve("dense", pool, queries, 1, letters)
    assert found == [[pool[3]],
                     [max(pool, key=lambda e: float(letters([e["input"]]) @ letters(["river"]).T))]]


def test_a_pool_that_is_too_small():
    pool = [{"task": "t", "input": "x", "output": "y"}] * 3
    for k in (3, 4):  # of three, three are no choice
        with pytest.raises(UserError, match=f"task t: 3 examples to retrieve from, and --k is {k}, .*less"):
            retrieve("bm25", pool, pool[:1], k, None)
