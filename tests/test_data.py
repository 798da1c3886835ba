"""Tests of data.py: tokens against transformers' own, batches against a slow search, files against direct counts."""

import gzip
import json
import random
import re
from collections import Counter
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pyarrow
import pytest
import tokenizers
import torch
from conftest import write_sentencepiece
from pyarrow import parquet
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import common
import data
import sources.tasks
import sources.text
from common import UserError
from data import MAX_INPUT, Corpus, Encoder, collate, sample_row, step_rows
from sources.tasks import SEEDS, load_tasks, read_examples
from sources.text import Tokenizer

# Tokenizer

NASTY = ["", " ", "a", " a", "3", " 3", "12", " 12", "a12b", "a 12 b", "x  12", "x   7", "\n7", "\n\n7", " \n 7", "\t7",
         "  7  8  ", "3.5", "1,907", "½", "Ⅷ", "x²", "٣٤", " ٣", "naïve café", "cafe\u0301", "日本語 テキスト", "Ελληνικά",
         "👍", "👩‍👩‍👧‍👦 12", "🇩🇪🇫🇷", "a\u00a012", "\u3000\u30005", "\u2003x", "zero\u200bwidth", "\ufeffbom", "\x00", "\x01\x02\x1f\x7f",
         "a\x00b 5\x0c6", "\x85 7", "\r\n\r\n", "\n" * 60, " " * 70, " " * 69 + "x", "\n" * 9 + "5", " \t" * 20 + "9", "it's they'll",
         "IT'S 'S 's '12", "don’t", "'", "''s", "!!! ?!", "a_b-c", "<|endoftext|>", "a <|endoftext|> b<|endoftext|>7",
         "<|im_start|>user", "\u2028\u2029", "\U0010ffff", "the river " * 50]
ALPHABET = [*"aZéßж漢ع'’.,!-_<|>", "'s", "'ll", " the", *"0193", "½", "٣", "Ⅷ", "²", *" \n\t\r\x00\x1f\x0b\u00a0\u3000\u200b", "  ",
            "\n\n", "🙂", "👍🏽", "\u0301", "<|endoftext|>"]


def random_texts(seed: int, n: int) -> list[str]:
    """Random strings; half of them mostly white space and digits, where pre-tokenizers differ most."""
    rng = random.Random(seed)
    spaces_and_digits = [*"0123456789", *" \n\t\u00a0", "  ", "a", "'s", "."]
    return ["".join(rng.choices(rng.choice([ALPHABET, spaces_and_digits]), k=rng.randint(1, 40))) for _ in range(n)]


def train_tokenizer(folder, digits: bool, texts: list[str], lacking=(), vocab_size: int = 600) -> Tokenizer:
    """A byte-level BPE tokenizer whose merges come from `texts`, saved and read again."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]) \
        if digits else byte_level
    backend.decoder = decoders.ByteLevel()
    alphabet = [c for c in pre_tokenizers.ByteLevel.alphabet() if c not in lacking]
    assert len(alphabet) == 256 - len(lacking)
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)
    return Tokenizer(str(folder))


def assert_like_transformers(tokenizer: Tokenizer, texts: list[str]) -> None:
    assert tokenizer.encoding is not None
    for text in texts:
        assert tokenizer.encode(text) == tokenizer.reference(text), repr(text)


def test_tiktoken_gives_transformers_ids(llm_folder):
    assert_like_transformers(Tokenizer(str(llm_folder)), NASTY + random_texts(0, 1500))


@pytest.mark.parametrize("digits", [False, True])
def test_tiktoken_gives_transformers_ids_where_white_space_and_digits_merge(tmp_path, digits):
    """The tiny models' vocabularies have no token of two spaces, so a wrong split of white space would not show there."""
    tokenizer = train_tokenizer(tmp_path, digits, random_texts(1, 2000))
    assert {"ĠĠ", "ĊĊ"} <= tokenizer.hf.get_vocab().keys()
    assert_like_transformers(tokenizer, NASTY + random_texts(0, 3000))


def test_special_tokens_in_a_text_are_plain_text(llm_folder):
    tokenizer = Tokenizer(str(llm_folder))
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.hf.eos_token_id not in ids and tokenizer.bos_id is None
    assert tokenizer.hf.backend_tokenizer.decode(ids, skip_special_tokens=False) == "a<|endoftext|>b"


def test_digits_are_split_one_by_one_only_where_the_tokenizer_says_so(gpt2, llama):
    vocabulary = Tokenizer(str(gpt2)).hf.get_vocab()
    assert "12" in vocabulary or "Ġ12" in vocabulary  # else this could not fail
    assert len(Tokenizer(str(llama)).encode("1907")) == 4
    assert len(Tokenizer(str(gpt2)).encode(" 12")) == 1


@pytest.mark.parametrize("digits", [False, True])
def test_a_byte_that_the_vocabulary_lacks_is_dropped(tmp_path, digits):
    missing = {"\x00": chr(256), "\x01": chr(257), "\x7f": chr(256 + 33)}  # as byte-level BPE writes these bytes
    tokenizer = train_tokenizer(tmp_path, digits, ["a small boat 12 17"] * 9, missing.values(), 300)
    for character in missing:
        assert tokenizer.encode(character) == tokenizer.reference(character) == []
        assert tokenizer.encode(f"a{character}") == tokenizer.encode("a") != []
    rng = random.Random(3)
    assert_like_transformers(tokenizer, [
        "".join(rng.choices([*missing, *"a boat12\n", "🙂"], k=rng.randint(1, 30))) for _ in range(500)])


@pytest.fixture
def word_tokenizer(tmp_path):
    """Not byte-level, and with a BOS that its template adds."""
    backend = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "a": 2, "boat": 3, "sad": 4}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>").save_pretrained(tmp_path / "word")
    return Tokenizer(str(tmp_path / "word"))


def test_another_kind_of_tokenizer_takes_transformers_way(word_tokenizer):
    assert word_tokenizer.encoding is None
    assert word_tokenizer.encode("a boat zz sad") == [2, 3, 0, 4]
    assert word_tokenizer.bos_id == 1


@pytest.mark.parametrize("pre, understood", [
    ({"type": "ByteLevel", "add_prefix_space": True}, False), ({"type": "Metaspace"}, False), ({}, False),
    ({"type": "Sequence", "pretokenizers": []}, False),
    ({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": False},
                                            {"type": "ByteLevel", "add_prefix_space": False}]}, False),
    ({"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": "x+"}},
                                            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]}, "x+"),
    ({"type": "ByteLevel", "add_prefix_space": False}, True)])
def test_only_understood_pre_tokenizers_go_through_tiktoken(pre, understood):
    pattern = sources.text.split_pattern(pre)
    assert pattern == understood if isinstance(understood, str) else (pattern is not None) == understood


def test_unknown_tokenizer_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no tokenizer at"):
        Tokenizer(str(tmp_path / "nothing"))


# Templates and lengths


def example(text: str, output: str = "happy", options=("happy", "sad"), task: str = "t") -> dict:
    return {"task": task, "input": text, "output": output, "options": list(options)}


def encoder(folder, template="space", **kw) -> Encoder:
    return Encoder(Tokenizer(str(folder)), template, **({"context_len": 900} | kw))


def text_of(enc: Encoder, ids: list[int]) -> str:
    return enc.tokenizer.hf.backend_tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("template, expected", [
    ("space", "the river happy cold boat 12 sad"), ("newline", "the river\nhappy\n\n\ncold boat 12\nsad")])
def test_template_text(llm_folder, template, expected):
    enc = encoder(llm_folder, template)
    demos = [example("the river"), example("cold boat 12", "sad")]
    ids = enc.demonstrations(demos, 900)
    x, (y,) = enc.training_query(example("late ships", "sad"))
    before_answer, between = {"space": (" ", " "), "newline": ("\n", "\n\n\n")}[template]
    assert text_of(enc, ids) == expected
    assert text_of(enc, ids + x + y) == f"{expected}{between}late ships{before_answer}sad"
    first, options = enc.scoring_query(example("late ships"), first=True)
    assert text_of(enc, first) == "late ships"
    assert [text_of(enc, option) for option in options] == [f"{before_answer}happy", f"{before_answer}sad"]


def test_input_is_cut_at_its_end_and_a_label_never(llm_folder):
    enc = encoder(llm_folder)
    long = " ".join(str(i) for i in range(1000))
    whole = enc.tokenizer.encode(" " + long)
    assert enc.query(example(long)) == whole[:MAX_INPUT] and len(whole) > MAX_INPUT == 256
    assert enc.answer(long) == whole
    x, (y,) = enc.training_query(example("short", long))
    assert (x, y) == (enc.tokenizer.encode(" short"), whole)


def pieces(enc: Encoder, demos: list[dict]) -> list[list[int]]:
    """Token ids of each demonstration, the first one without separator, from the template's text."""
    before_answer, between = data.TEMPLATES[enc.template]
    return [enc.tokenizer.encode((between if i else "") + e["input"]) + enc.tokenizer.encode(before_answer + e["output"])
            for i, e in enumerate(demos)]


def test_demonstrations_stop_at_the_first_that_would_pass_the_limit_and_never_split(llama):
    enc = encoder(llama)
    demos = [example("boat " * n, "sad") for n in (3, 5, 40, 1, 2)]
    parts = pieces(enc, demos)
    ends = np.cumsum([len(part) for part in parts])
    assert len(parts[2]) > len(parts[3])  # a shorter one after the one that does not fit is left out as well
    for limit in range(len(parts[0]), ends[-1] + 2):
        fit = int((ends <= limit).sum())
        assert enc.demonstrations(demos, limit) == [*chain(*parts[:fit])], limit


def test_one_demonstration_too_long_alone_is_skipped(llama):
    enc = encoder(llama)
    demos = [example("boat " * 60), example("the river", "sad"), example("cold")]
    rest = enc.demonstrations(demos[1:], 900)
    assert enc.demonstrations(demos, len(rest)) == rest
    with pytest.raises(UserError, match="task t: not one of 3 demonstrations fits into 1 tokens"):
        enc.demonstrations(demos, 1)


def test_budget_holds_at_most_l_tokens_and_keeps_a_label(llm_folder):
    enc = encoder(llm_folder)
    demos = [example("boat " * n + "green", "sad") for n in (9, 4, 30, 6)]
    label = enc.answer("sad")
    everything = [*chain(*pieces(enc, demos))]
    for limit in range(len(label), len(everything) + 3):
        ids = enc.budget(demos, limit)
        assert len(ids) <= limit and ids[-len(label):] == label
    assert enc.budget(demos, len(everything)) == everything
    shortest = pieces(enc, demos[1:2])[0]
    assert enc.budget(demos, len(shortest)) == shortest  # the first does not fit, the second does
    cut = enc.budget(demos, len(shortest) - 1)           # none fits: the shortest, its input cut at the end
    assert cut == shortest[:-len(label)][:len(shortest) - 1 - len(label)] + label


@pytest.mark.parametrize("template, no_input, no_label", [
    ("space", "happy sad ok happy", "the river cold boat 12 late ships bread"),
    ("newline", "happy\n\n\nsad\n\n\nok\n\n\nhappy", "the river\n\n\ncold boat 12\n\n\nlate ships\n\n\nbread")])
def test_demonstrations_without_input_or_label(llm_folder, template, no_input, no_label):
    enc = encoder(llm_folder, template)
    demos = [example("the river"), example("cold boat 12", "sad"), example("late ships", "ok"), example("bread")]
    assert text_of(enc, enc.demonstrations([e | {"input": ""} for e in demos], 900)) == no_input
    assert text_of(enc, enc.demonstrations([e | {"output": ""} for e in demos], 900)) == no_label
    for without in ({"input": ""}, {"output": ""}):  # a demonstration is read in the same tokens wherever it stands
        parts = [enc.demonstration(e | without, first=i == 0) for i, e in enumerate(demos)]
        assert enc.demonstrations([e | without for e in demos], 900) == [*chain(*parts)]
    spoiled = example("boat " * 40, "ok")  # cut, it keeps the label it was given, and none where that was taken away
    assert enc.budget([spoiled], 12)[-len(enc.answer("ok")):] == enc.answer("ok")
    assert enc.budget([spoiled | {"output": ""}], 12) == enc.query(spoiled, first=True)[:12]


LABELS = ["ok", "a much longer label of many tokens", "sad"]


@pytest.mark.parametrize("context_len, distill_len, llm_positions, distiller_positions", [
    (900, 100, 1024, 1024), (900, 4, 640, 640), (900, 200, 2048, 1024), (50, 100, 1024, 1024), (900, 8, None, None),
    (900, 8, None, 512), (900, 100, 512, None)])
def test_limit_is_the_formula_of_appendix_a(llama, context_len, distill_len, llm_positions, distiller_positions):
    enc = encoder(llama, context_len=context_len, distill_len=distill_len, llm_positions=llm_positions,
                  distiller_positions=distiller_positions)
    examples = [example("boat", "ok", LABELS), example("river", "sad", ["sad"])]
    longest = max(len(enc.tokenizer.reference(" " + label)) for label in LABELS)
    infinite = 10 ** 9
    assert enc.limit(examples) == min(context_len, (distiller_positions or infinite) - distill_len,
                                      (llm_positions or infinite) - 256 - longest)


def test_limit_leaves_room_for_bos(word_tokenizer):
    enc = Encoder(word_tokenizer, "space", context_len=900, llm_positions=300)
    assert enc.limit([example("a", "sad boat", ["sad boat"])]) == 300 - 256 - 2 - 1


def test_limit_is_fixed_per_task_and_every_query_fits(llm_folder, tasks_dir):
    enc = encoder(llm_folder, distill_len=4, llm_positions=400, distiller_positions=200)
    tasks = load_tasks(str(tasks_dir), "class_to_class")
    for task in tasks.train:
        limit = tasks.limit(task, enc.limit)
        assert limit == enc.limit(tasks.pool(task)) == enc.limit(tasks.pool(task)[::-1]) == tasks.limit(task, enc.limit)
        for seed in range(20):
            row = sample_row(tasks, enc, seed, 0, 16, 4)
            assert len(row["demo"]) + enc.distill_len <= 200
            assert all(len(row["demo"]) + 256 + len(y) <= 400 for _, (y,) in row["queries"])


# Batches


def random_rows(rng: random.Random) -> list[dict]:
    def ids(low: int, high: int) -> list[int]:
        return [rng.randint(1, 400) for _ in range(rng.randint(low, high))]
    n_options = rng.choice([0, 1, 4])
    return [{"demo": ids(0, 9), "queries": [(ids(1, 7), [ids(1, 4) for _ in range(rng.randint(min(1, n_options), n_options))])
                                            for _ in range(rng.randint(1, 4))]} for _ in range(rng.randint(1, 5))]


def slow_row(row: dict) -> list[dict]:
    """The tokens of a row; predictors are found by search: the token one position earlier that this one may see."""
    tokens = []
    for segment, (x, options) in enumerate(row["queries"]):
        tokens += [{"id": t, "segment": segment, "branch": 0, "position": i} for i, t in enumerate(x)]
        for branch, option in enumerate(options, 1):
            tokens += [{"id": t, "segment": segment, "branch": branch, "position": len(x) + i} for i, t in enumerate(option)]
    for token in tokens:
        seen = [column for column, other in enumerate(tokens) if other["segment"] == token["segment"]
                and other["branch"] in (0, token["branch"]) and other["position"] == token["position"] - 1]
        assert len(seen) == (token["position"] > 0)
        token["predictor"] = seen[0] + 1 if seen else 0
    return tokens


@pytest.mark.parametrize("seed", range(40))
def test_collate_against_a_slow_reference(seed):
    rows = random_rows(random.Random(seed))
    batch = collate(rows)
    slow = [slow_row(row) for row in rows]
    B, T_d, T = len(rows), max(len(row["demo"]) for row in rows), max(map(len, slow))
    names = {"query_ids": "id", "segment": "segment", "branch": "branch", "position": "position", "predictor": "predictor"}
    assert batch.keys() == {"demo_ids", "demo_mask", "query_mask", *names}
    assert batch["demo_ids"].shape == batch["demo_mask"].shape == (B, T_d)
    for b, row in enumerate(rows):
        n = len(row["demo"])
        assert batch["demo_mask"][b].tolist() == [False] * (T_d - n) + [True] * n
        assert batch["demo_ids"][b, T_d - n:].tolist() == row["demo"]
        assert batch["query_mask"][b].tolist() == [True] * len(slow[b]) + [False] * (T - len(slow[b]))
        for name, key in names.items():
            assert batch[name].shape == (B, T) and batch[name].dtype == torch.long
            assert batch[name][b, :len(slow[b])].tolist() == [token[key] for token in slow[b]], name
    assert batch["demo_mask"].dtype == batch["query_mask"].dtype == torch.bool
    assert batch["predictor"].min() >= 0 and batch["predictor"].max() <= T  # also in the padding: gather reads there


# Sampling


@pytest.fixture
def tiny_tasks(tasks_dir):
    return load_tasks(str(tasks_dir), "class_to_class")


class Named:
    """Stands in for Encoder: rows hold the examples themselves."""

    @staticmethod
    def limit(examples):
        return 900

    @staticmethod
    def demonstrations(examples, limit):
        return [(e["task"], e["input"], e["output"]) for e in examples]

    @staticmethod
    def training_query(e):
        return (e["task"], e["input"], e["output"])


def test_queries_and_demonstrations_are_different_examples_of_one_task(tiny_tasks):
    drawn = Counter()
    for sample in range(200):
        row = sample_row(tiny_tasks, Named, 5, sample, 16, 4)
        everything = row["demo"] + row["queries"]
        assert (len(row["demo"]), len(row["queries"]), len(set(everything))) == (16, 4, 20)
        assert len({task for task, *_ in everything}) == 1
        drawn[everything[0][0]] += 1
    assert drawn.keys() == set(tiny_tasks.train) and min(drawn.values()) > 20  # tasks are drawn evenly: 40 each


def long_row(number: int) -> dict:
    """A row of its own length: 1 to 900 demonstration tokens, 1 to 60 query tokens, no two alike."""
    rng = np.random.default_rng(number)
    return {"demo": [number] * rng.integers(1, 900), "queries": [([0] * rng.integers(1, 60), [[1]])]}


def drawn_step_rows(seed: int, per_step: int):
    return step_rows(lambda first, count: [long_row(i) for i in range(first, first + count)], seed, per_step)


def test_steps_share_out_their_samples():
    rows = drawn_step_rows(3, 8)
    for first in (0, 64):
        samples = [row["demo"][0] for step in range(first, first + 64) for row in rows(step)]
        assert sorted(samples) == list(range(8 * first, 8 * (first + 64)))
    assert all(len(rows(step)) == 8 for step in (0, 63, 64))


def test_a_step_is_a_function_of_seed_and_step():
    rows, again = drawn_step_rows(3, 8), drawn_step_rows(3, 8)
    steps = [5, 70, 6, 0, 64, 63]
    assert {s: rows(s) for s in steps} == {s: again(s) for s in steps[::-1]}
    assert [drawn_step_rows(4, 8)(s) for s in steps] != [rows(s) for s in steps]


def test_rows_of_similar_length_meet_in_random_order():
    """Padding of batches of eight: over 40% as drawn, under 10% by length; the order of the steps says nothing."""
    def padding(batches):
        batches = [collate(batch) for batch in batches]
        masks = [batch[name] for batch in batches for name in ("demo_mask", "query_mask")]
        return 1 - sum(m.sum() for m in masks) / sum(m.numel() for m in masks)

    rows = drawn_step_rows(3, 8)
    assert padding([[long_row(i) for i in range(j, j + 8)] for j in range(0, 512, 8)]) > 0.4
    assert padding([rows(step) for step in range(64)]) < 0.1
    widths = [max(len(row["demo"]) for row in rows(step)) for step in range(64)]
    assert abs(np.corrcoef(widths, range(64))[0, 1]) < 0.4


def test_a_sample_is_a_function_of_seed_and_number(tiny_tasks, tasks_dir):
    def sample(seed, number, tasks=tiny_tasks):
        return json.dumps(sample_row(tasks, Named, seed, number, 4, 2))
    drawn = [sample(seed, number) for seed in (1, 2) for number in range(30)]
    assert len(set(drawn)) == 60
    torch.manual_seed(9), np.random.seed(9), random.seed(9)
    again = load_tasks(str(tasks_dir), "class_to_class")
    assert [sample(seed, number, again) for seed in (2, 1) for number in range(30)] == drawn[30:] + drawn[:30]


def test_exact_duplicates_leave_the_pool(tmp_path, tasks_dir):
    lines = [example("a"), example("b"), example("a"), example("a", "sad"), example("b")]
    folder = write_tasks(tmp_path / "tasks", {"emotion": lines}, {"ag_news": [example("q")]})
    pool = load_tasks(str(folder), "class_to_class").pool("emotion")
    assert [(e["input"], e["output"]) for e in pool] == [("a", "happy"), ("b", "happy"), ("a", "sad")]


# Pretraining text


@pytest.fixture
def tokenizer(llama):
    return Tokenizer(str(llama))


def texts_of(folder) -> list[str]:
    return [json.loads(line)["text"] for path in sorted(folder.iterdir()) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.8, 0.9])
def test_a_window_is_split_at_beta_of_its_own_length(corpus_dir, tokenizer, beta):
    corpus = Corpus([str(corpus_dir)], tokenizer, 100, 64)
    usable = [ids[:100] for ids in map(tokenizer.reference, texts_of(corpus_dir)) if len(ids) >= 64]
    assert {len(ids) < 100 for ids in usable} == {True, False}  # short documents and cut ones
    assert len(usable) == len(corpus.spans) == len(corpus.train) + len(corpus.held_out)
    for number, ids in enumerate(usable):
        row = corpus.row(number, beta)
        (query, (x,)), = row["queries"]
        assert query == [] and row["demo"] + x == ids
        assert abs(len(row["demo"]) - beta * len(ids)) <= 0.5


def test_held_out_documents_are_never_trained_on_and_each_pass_sees_every_other_once(corpus_dir, tokenizer):
    corpus = Corpus([str(corpus_dir)], tokenizer, 128, 64)
    held_out = {tuple(corpus.row(d, 0.5)["demo"]) for d in corpus.held_out}
    n = len(corpus.train)
    assert len(held_out) == -(-len(corpus.spans) // 20) and n > 20
    trained = [tuple(row["demo"]) for row in corpus.training_rows(3, 0, 3 * n, 0.5)]
    assert not held_out & set(trained)
    for epoch in range(3):
        assert len(set(trained[epoch * n:(epoch + 1) * n])) == n
    assert trained[:n] != trained[n:2 * n]
    assert [tuple(r["demo"]) for r in corpus.training_rows(3, n - 2, 5, 0.5)] == trained[n - 2:n + 3]
    assert [tuple(r["demo"]) for r in corpus.training_rows(4, 0, n, 0.5)] != trained[:n]


def test_all_documents_too_short(corpus_dir, tokenizer):
    longest = max(len(tokenizer.reference(text)) for text in texts_of(corpus_dir))
    with pytest.raises(UserError, match=rf"0 of 60 documents have at least 5000.*longest has {longest}.*--min-doc-len"):
        Corpus([str(corpus_dir)], tokenizer, 128, 5000)


def test_jsonl_gz_and_txt_are_read(tmp_path, corpus_dir, tokenizer):
    texts = texts_of(corpus_dir)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    zipped = Corpus([str(tmp_path / "a.jsonl.gz")], tokenizer, 128, 64)
    plain = Corpus([str(corpus_dir)], tokenizer, 128, 64)
    assert np.array_equal(zipped.tokens, plain.tokens) and np.array_equal(zipped.spans, plain.spans)
    (tmp_path / "b.txt").write_text("\n\n".join(texts), encoding="utf-8")
    (tmp_path / "notes.md").write_text("not text to train on")
    passages = list(sources.text.read_documents(sources.text.corpus_files([str(tmp_path / "b.txt")]), 1000))
    assert "\n".join(passages) == "\n".join(texts)  # nothing is lost and no paragraph is split
    assert all(len(p) >= 1000 for p in passages[:-1]) and len(passages) > 2
    assert [p.name for p in sources.text.corpus_files([str(tmp_path)])] == ["a.jsonl.gz", "b.txt"]


def test_text_is_tokenised_once(tmp_path, corpus_dir, tokenizer, monkeypatch):
    copy = tmp_path / "part.jsonl"
    copy.write_text((corpus_dir / "part.jsonl").read_text())
    first = Corpus([str(copy)], tokenizer, 128, 64)
    assert isinstance(first.tokens, np.memmap) and str(first.tokens.filename).startswith(str(common.CACHE))

    def never(self, text):
        raise RuntimeError("tokenised again")
    monkeypatch.setattr(Tokenizer, "encode", never)
    again = Corpus([str(copy)], tokenizer, 128, 100)  # another --min-doc-len needs no new tokens either
    assert np.array_equal(first.tokens, again.tokens) and len(again.spans) < len(first.spans)
    copy.write_text(copy.read_text() + json.dumps({"text": "more"}) + "\n")
    with pytest.raises(RuntimeError, match="tokenised again"):
        Corpus([str(copy)], tokenizer, 128, 64)


def test_an_interrupted_tokenisation_is_not_taken_for_a_whole_one(corpus_dir, tokenizer, monkeypatch):
    encode, calls = Tokenizer.encode, []

    def stops(self, text):
        calls.append(text)
        if len(calls) == 30:
            raise KeyboardInterrupt
        return encode(self, text)
    monkeypatch.setattr(Tokenizer, "encode", stops)
    with pytest.raises(KeyboardInterrupt):
        Corpus([str(corpus_dir)], tokenizer, 128, 64)
    monkeypatch.setattr(Tokenizer, "encode", encode)
    assert len(Corpus([str(corpus_dir)], tokenizer, 128, 64).tokens) == sum(
        len(tokenizer.reference(text)) for text in texts_of(corpus_dir))


@pytest.mark.parametrize("content", [gzip.compress(b'{"text": "fine"}\n' * 500)[:-9], b"no gzip", b"\x1f\x8b" + b"x" * 40,
                                     gzip.compress(b'{"text": "caf\xe9"}\n')])
def test_a_file_that_cannot_be_read_is_named(tmp_path, content):
    (tmp_path / "part.jsonl.gz").write_bytes(content)
    with pytest.raises(UserError, match=r"part\.jsonl\.gz cannot be read as UTF-8 text"):
        list(sources.text.json_lines(tmp_path / "part.jsonl.gz", "an object"))


@pytest.mark.parametrize("content, message", [
    ('{"text": "fine"}\n{"text": "cut', r"part\.jsonl, line 2: expected a JSON object"),
    ('{"text": "fine"}\n{"txt": "x"}\n', r"part\.jsonl, line 2: expected .*found {'txt': 'x'}"),
    ('{"text": 3}\n', r"part\.jsonl, line 1: expected .*found {'text': 3}"),
    ("[1]\n", r"part\.jsonl, line 1: .*TypeError"), ("", "holds no text at all")])
def test_broken_text_is_a_user_error(tmp_path, tokenizer, content, message):
    (tmp_path / "part.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        Corpus([str(tmp_path)], tokenizer, 128, 64)


def test_missing_text_is_a_user_error(tmp_path, tokenizer):
    with pytest.raises(UserError, match="does not exist"):
        Corpus([str(tmp_path / "nothing")], tokenizer, 128, 64)
    with pytest.raises(UserError, match=r"no \.jsonl"):
        Corpus([str(tmp_path)], tokenizer, 128, 64)


# Tasks


def write_tasks(folder, train: dict, test: dict):
    for task, examples in train.items():
        (folder / task).mkdir(parents=True, exist_ok=True)
        (folder / task / f"{task}_16384_100_train.jsonl").write_text("".join(json.dumps(e) + "\n" for e in examples))
    for task, examples in test.items():
        (folder / task).mkdir(parents=True, exist_ok=True)
        for part in ("train", "dev", "test"):
            (folder / task / f"{task}_16_100_{part}.jsonl").write_text("".join(json.dumps(e) + "\n" for e in examples))
    return folder


def test_present_and_missing_tasks(tiny_tasks):
    table = json.loads((common.ROOT / "splits.json").read_text())["metaicl"]["settings"]["class_to_class"]
    train, test = {"emotion", "glue-sst2", "trec", "rotten_tomatoes", "sms_spam"}, {"ag_news", "emo"}
    assert (set(tiny_tasks.train), set(tiny_tasks.test), tiny_tasks.collection) == (train, test, "metaicl")
    assert set(tiny_tasks.missing_train) == set(table["train"]) - train
    assert set(tiny_tasks.missing_test) == set(table["test"]) - test


def test_sick_is_evaluated_and_not_trained_on(tmp_path):
    one = [example("a")]
    folder = write_tasks(tmp_path, {"sick": one, "ag_news": one}, {"sick": one})
    tasks = load_tasks(str(folder), "non_nli_to_nli")
    assert (tasks.train, tasks.test) == (["ag_news"], ["sick"])


@pytest.mark.parametrize("split", common.SPLITS)
def test_no_task_is_both_trained_on_and_tested(tmp_path, split):
    setting = json.loads((common.ROOT / "splits.json").read_text())["metaicl"]["settings"][split]
    one = [example("a")]
    folder = write_tasks(tmp_path, dict.fromkeys(setting["train"], one), dict.fromkeys(setting["test"], one))
    tasks = load_tasks(str(folder), split)
    assert not set(tasks.train) & set(tasks.test) and set(tasks.test) == set(setting["test"])
    assert set(setting["train"]) - set(tasks.train) <= {"sick"}


def test_load_tasks_errors(tmp_path, tasks_dir):
    with pytest.raises(UserError, match="does not exist; give metaicl, bigbench, or a folder"):
        load_tasks(str(tmp_path / "nothing"), "class_to_class")
    (tmp_path / "my_task").mkdir()
    with pytest.raises(UserError, match="has 0 of .* meta-train and 0 of .* meta-test tasks of class_to_class; expected"):
        load_tasks(str(tmp_path), "class_to_class")
    with pytest.raises(UserError, match="of qa_to_qa"):
        load_tasks(str(tasks_dir), "qa_to_qa")


def test_functions_are_found_by_their_folders_and_none_is_trained_on(tmp_path):
    one = [example("a")]
    names = ["list_functions-c001", "mult_data_wrangling-login_1_names_1"]
    others = dict.fromkeys(["gem-xsum", "word_sorting", "list_functions", "emo"], one)
    folder = write_tasks(tmp_path, {"gem-xsum": one}, dict.fromkeys(names, one) | others)
    (folder / "list_functions-empty").mkdir()
    tasks = load_tasks(str(folder), "functions")
    assert (tasks.train, tasks.test, tasks.collection) == ([], names, "bigbench")
    assert (tasks.missing_train, tasks.missing_test) == ([], ["list_functions-empty"])
    assert set(tasks.types.values()) == {"multi-choice"}  # the headline is accuracy
    with pytest.raises(UserError, match="0 of 0 meta-test tasks of functions; expected folders such as "
                                        ".*/list_functions-c001/list_functions-c001_16_100_test.jsonl"):
        load_tasks(str(write_tasks(tmp_path / "other", {}, {"emo": one})), "functions")


def test_table_1_and_show_without_training_tasks(tmp_path, llama, capsys):
    write_tasks(tmp_path, {}, {"list_functions-c001": [example("a")]})
    argv = ["--preset", "pocket", "--llm", str(llama), "--tasks", str(tmp_path), "--split", "functions"]
    figures = data.main(argv)
    assert figures["train"] == {"tasks": 0, "of": 0, "examples": 0, "avg_len": 0.0, "missing": []}
    assert figures["test"]["tasks"] == figures["test"]["of"] == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    with pytest.raises(UserError, match="--show needs a meta-training task, and functions has none"):
        data.main([*argv, "--show", "1"])


def test_files_of_a_seed(tiny_tasks):
    files = tiny_tasks.files("ag_news", 13)
    assert {part: len(examples) for part, examples in files.items()} == {"train": 16, "dev": 16, "test": 24}
    path = tiny_tasks.folder / "ag_news" / "ag_news_16_13_test.jsonl"
    assert files["test"] == [json.loads(line) for line in path.read_text().splitlines()]
    with pytest.raises(UserError, match="no files of seed 7; MetaICL's seeds are 13, 21, 42, 87, 100"):
        tiny_tasks.files("ag_news", 7)


def test_data_hash_follows_the_content(tmp_path):
    folder = write_tasks(tmp_path, {"emotion": [example("a")]}, {"ag_news": [example("b")], "emo": [example("b")]})
    tasks = load_tasks(str(folder), "class_to_class")
    before = tasks.data_hash("ag_news", 100)
    assert tasks.data_hash("emo", 100) == before
    for part in ("train", "dev", "test"):
        path = folder / "ag_news" / f"ag_news_16_100_{part}.jsonl"
        whole = path.read_text()
        path.write_text(whole.replace('"b"', '"c"'))
        assert tasks.data_hash("ag_news", 100) != before
        path.write_text(whole)


def write_examples(path, examples: list[dict]) -> None:
    path.write_text("".join(json.dumps(e) + "\n" for e in examples))


def test_retrieval_pool(tmp_path):
    """The union of all seeds' training files; nothing twice, no dev or test question; the 100-shot files where there are any."""
    folder = write_tasks(tmp_path, {"emotion": [example("a")]}, {"emo": [example("a")]})
    tasks, emo = load_tasks(str(folder), "class_to_class"), folder / "emo"
    for seed, train in ((13, ["a", "b", "dev 13"]), (42, ["b", "c", "test"]), (100, ["d", "dev 42"])):
        write_examples(emo / f"emo_16_{seed}_train.jsonl", [example(text) for text in train])
        write_examples(emo / f"emo_16_{seed}_dev.jsonl", [example(f"dev {seed}")])
        write_examples(emo / f"emo_16_{seed}_test.jsonl", [example("test", "sad")])  # asks the same with another answer
    write_examples(emo / "emo_16384_100_train.jsonl", [example("never")])
    assert sorted(e["input"] for e in tasks.retrieval_pool("emo", 13)) == ["a", "b", "c", "d", "dev 42"]
    assert sorted(e["input"] for e in tasks.retrieval_pool("emo", 42)) == ["a", "b", "c", "d", "dev 13"]
    for seed in (13, 21):
        write_examples(emo / f"emo_100_{seed}_train.jsonl", [example(f"shot {seed}"), example("test"), example("both")])
    assert [e["input"] for e in tasks.retrieval_pool("emo", 13)] == ["shot 13", "both", "shot 21"]


def test_data_hash_of_retrieval_covers_the_pool(tmp_path):
    folder = write_tasks(tmp_path, {"emotion": [example("a")]}, {"emo": [example("a")]})
    tasks, other = load_tasks(str(folder), "class_to_class"), folder / "emo" / "emo_16_13_train.jsonl"
    hashes = []
    for text in ("x", "y"):
        write_examples(other, [example(text)])
        hashes.append((tasks.data_hash("emo", 100), tasks.data_hash("emo", 100, retrieval=True)))
    write_examples(folder / "emo" / "emo_100_13_train.jsonl", [example("z")])
    hashes.append((tasks.data_hash("emo", 100), tasks.data_hash("emo", 100, retrieval=True)))
    assert len({plain for plain, _ in hashes}) == 1 and len({pool for _, pool in hashes}) == 3


@pytest.mark.parametrize("line, message", [
    ('{"task": "t", "input": "a"', "line 2: expected"), ('{"task": "t", "input": "a"}', "KeyError"), ("[]", "TypeError"),
    ('{"task": "t", "input": 3, "output": "x"}', "AttributeError"),
    ('{"task": "t", "input": "  ", "output": "x"}', "line 2: the input or the output is empty"),
    ('{"task": "t", "input": "a", "output": ""}', "line 2: the input or the output is empty")])
def test_broken_example_lines(tmp_path, line, message):
    path = tmp_path / "t.jsonl"
    path.write_text(f"{json.dumps(example('a'))}\n{line}\n")
    with pytest.raises(UserError, match=message):
        read_examples(path)
    with pytest.raises(UserError, match="does not exist"):
        read_examples(tmp_path / "u.jsonl")


def test_read_examples_strips_and_takes_missing_options(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"task": "t", "input": " a\\u2028b ", "output": "x\\n", "options": [" x", "y "]}\n\n'
                    '{"task": "t", "input": "c", "output": "z", "options": null}\n', encoding="utf-8")
    assert read_examples(path) == [example("a\u2028b", "x", ["x", "y"]), example("c", "z", [])]


def test_scoring_needs_options_with_the_gold_answer():
    sources.tasks.require_options([example("a"), example("b", "sad")])
    with pytest.raises(UserError, match="task t: the example 'b' cannot be scored, as it has no options"):
        sources.tasks.require_options([example("a"), example("b", options=())])
    with pytest.raises(UserError, match="its answer 'odd' is not among"):
        sources.tasks.require_options([example("b", "odd")])


# The hub, played by a stub


@pytest.fixture
def hub(monkeypatch):
    """datasets.load_dataset gives these rows; a row that is an exception is raised. Holds what was asked for."""
    import datasets
    found = SimpleNamespace(rows={}, asked=[])

    def load_dataset(name, *configuration, split, streaming, revision):
        assert streaming and revision == sources.text.HUB_REVISIONS[name]
        found.asked.append((name, *configuration, split))
        for row in found.rows[split]:
            if isinstance(row, BaseException):
                raise row
            yield row
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(sources.text, "require_hub", lambda what: None)
    return found


def test_hub_tasks_are_written_once_in_metaicl_layout(hub):
    def row(task, text, seed, part):
        return example(text, task=task) | {"seed": seed, "split": part}
    hub.rows = {"meta_train": [row("emotion", "a", "100", "train"), row("emotion", "b", "100", "train")],
                "meta_eval": [row("emo", f"{part} {seed}", seed, part) for seed in ("13", "100") for part in ("train", "dev", "test")],
                "meta_eval_100shot": [row("emo", f"shot {seed} {i}", seed, "train") for seed in ("13", "100") for i in range(3)]}
    whole = hub.rows["meta_eval"]
    hub.rows["meta_eval"] = [*whole[:2], KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):  # half of it must not be taken for all of it
        load_tasks("metaicl", "class_to_class")
    hub.rows["meta_eval"] = whole
    tasks = load_tasks("metaicl", "class_to_class")
    assert (tasks.train, tasks.test) == (["emotion"], ["emo"])
    assert tasks.pool("emotion") == [example("a", task="emotion"), example("b", task="emotion")]
    for seed in (13, 100):
        assert tasks.files("emo", seed) == {p: [example(f"{p} {seed}", task="emo")] for p in ("train", "dev", "test")}
        shots = [example(f"shot {s} {i}", task="emo") for s in (100, 13) for i in range(3)]
        assert tasks.retrieval_pool("emo", seed) == shots
    n = len(hub.asked)
    assert set(hub.asked) == {(sources.text.HUB_TASKS, split) for split in ("meta_train", "meta_eval", "meta_eval_100shot")}
    assert load_tasks("metaicl", "class_to_class").train == ["emotion"] and len(hub.asked) == n


def test_c4_comes_from_the_hub_once(hub, corpus_dir, tokenizer):
    hub.rows = {"validation": [{"text": text} for text in texts_of(corpus_dir)]}
    corpus = Corpus(["c4"], tokenizer, 128, 64)
    assert np.array_equal(corpus.tokens, Corpus([str(corpus_dir)], tokenizer, 128, 64).tokens) and corpus.name == "c4"
    Corpus(["c4"], tokenizer, 128, 64)
    assert hub.asked == [(sources.text.HUB_TEXT, "en", "validation")]


def write_parquet(folder, split, rows, shards=1):
    """One split of a data set as its repository on the hub holds it."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for i in range(shards):
        name = f"{split}-{i:05d}-of-{shards:05d}.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(rows[i::shards]), folder / "data" / name)


@pytest.fixture
def local_hub(monkeypatch, tmp_path):
    """The two data sets as local folders of their repositories' layout, read by the real datasets library."""
    tasks, text = tmp_path / "EvalMetaICLAll", tmp_path / "c4"
    monkeypatch.setattr(sources.tasks, "HUB_TASKS", str(tasks))
    monkeypatch.setattr(sources.text, "HUB_TEXT", str(text))
    monkeypatch.setitem(sources.text.HUB_REVISIONS, str(tasks), "main")
    monkeypatch.setitem(sources.text.HUB_REVISIONS, str(text), "abc")
    monkeypatch.setattr(sources.text, "require_hub", lambda what: None)
    return tasks, text


def test_metaicl_through_datasets_from_parquet(local_hub):
    def row(task, text, seed, part, options=("happy", "sad")):
        return example(text, task=task) | {"options": list(options), "seed": seed, "split": part}
    train = [row("emotion", f"text {i}", "100", "train", ["happy", "sad"] if i % 2 else []) for i in range(6)]
    write_parquet(local_hub[0], "meta_train", train, shards=2)
    write_parquet(local_hub[0], "meta_eval", [row("emo", f"{part} {seed}", seed, part) for seed in ("13", "100")
                                              for part in ("train", "dev", "test")])
    write_parquet(local_hub[0], "meta_eval_100shot", [row("emo", "not read", "100", "train")])
    tasks = load_tasks("metaicl", "class_to_class")
    assert sorted(e["input"] for e in tasks.pool("emotion")) == [f"text {i}" for i in range(6)]
    assert sorted(len(e["options"]) for e in tasks.pool("emotion")) == [0, 0, 0, 2, 2, 2]
    for seed in (13, 100):
        assert {p: e["input"] for p, (e,) in tasks.files("emo", seed).items()} == {
            p: f"{p} {seed}" for p in ("train", "dev", "test")}
    assert tasks.folder.parent == common.CACHE and "main" in tasks.folder.name


def test_c4_through_datasets_from_its_own_layout(local_hub, corpus_dir, tokenizer):
    folder = local_hub[1]
    (folder / "en").mkdir(parents=True)
    for split, texts in (("train", ["not read " * 100] * 30), ("validation", texts_of(corpus_dir))):
        with gzip.open(folder / "en" / f"c4-{split}.00000-of-00001.json.gz", "wt") as file:
            file.writelines(json.dumps({"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "http://a"}) + "\n" for text in texts)
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: en\n  data_files:\n  - split: train\n    path: "
                                      "en/c4-train.*.json.gz\n  - split: validation\n    path: en/c4-validation.*.json.gz\n---\n")
    assert np.array_equal(Corpus(["c4"], tokenizer, 128, 64).tokens, Corpus([str(corpus_dir)], tokenizer, 128, 64).tokens)


def test_another_revision_of_c4_is_tokenised_anew(hub, corpus_dir, tokenizer, monkeypatch):
    hub.rows = {"validation": [{"text": text} for text in texts_of(corpus_dir)]}
    first = Corpus(["c4"], tokenizer, 128, 64)
    monkeypatch.setitem(sources.text.HUB_REVISIONS, sources.text.HUB_TEXT, "0" * 40)
    assert Corpus(["c4"], tokenizer, 128, 64).hash != first.hash and len(hub.asked) == 2


def test_hub_errors_name_the_offline_way(hub, local_hub, tokenizer):
    offline = "give a local folder in place of {}, or add --preset pocket after `make assets`"
    for rows, message in (([ConnectionError("no route")], "ConnectionError: no route"), ([{"texts": "x"}], "no column text among"),
                          ([OSError()], "OSError")):
        hub.rows = {"validation": rows}
        with pytest.raises(UserError, match=f"--corpus c4: .*c4, revision abc, split validation cannot be read.*{message}.*"
                                            + offline.format("c4")):
            Corpus(["c4"], tokenizer, 128, 64)
        assert not list(common.CACHE.glob("corpus-*/ends.npy"))


def test_a_data_set_that_is_not_there_names_the_offline_way(local_hub):
    with pytest.raises(UserError, match="--tasks metaicl: .*EvalMetaICLAll, revision main, split meta_train cannot be read.*"
                                        "give a local folder in place of metaicl"):
        load_tasks("metaicl", "class_to_class")
    assert not [path for path in common.CACHE.glob("metaicl*") if path.suffix != ".tmp"]


# Tokenizers that put a space of their own before a text, as SentencePiece's do


def sentencepiece(tmp_path, corpus_dir, kind):
    write_sentencepiece(tmp_path / kind, kind, texts_of(corpus_dir))
    return Tokenizer(str(tmp_path / kind))


@pytest.mark.parametrize("kind", ["t5", "llama2"])
def test_pieces_of_text_have_the_tokens_of_the_whole(tmp_path, corpus_dir, kind):
    """A demonstration is put together from pieces: no second space may come in where they join."""
    tokenizer = sentencepiece(tmp_path, corpus_dir, kind)
    assert tokenizer.encoding is None
    text = texts_of(corpus_dir)[0]
    for cut in [i for i, c in enumerate(text) if c == " "][:20]:
        assert tokenizer.encode(text[:cut]) + tokenizer.encode(text[cut:]) == tokenizer.reference(text)
    encoder = Encoder(tokenizer, "space", 900)
    demos = [example("the river is cold", "happy"), example("a small boat", "sad")]
    assert encoder.demonstrations(demos, 900) == tokenizer.reference("the river is cold happy a small boat sad")


def test_newlines_that_a_tokenizer_drops_are_an_error_and_others_are_kept(tmp_path, corpus_dir, tokenizer):
    with pytest.raises(UserError, match="--template newline, but the tokenizer of .*t5 drops newlines.*--template space"):
        Encoder(sentencepiece(tmp_path, corpus_dir, "t5"), "newline", 900)
    llama2 = sentencepiece(tmp_path, corpus_dir, "llama2")
    for kept in (llama2, tokenizer):
        ids = Encoder(kept, "newline", 900).demonstrations([example("the river", "happy"), example("a boat", "sad")], 900)
        assert ids == kept.reference("the river\nhappy\n\n\na boat\nsad")


def test_a_bos_is_taken_where_the_tokenizer_adds_one(tmp_path, corpus_dir, tokenizer):
    assert sentencepiece(tmp_path, corpus_dir, "llama2").bos_id == 1
    assert sentencepiece(tmp_path, corpus_dir, "t5").bos_id is None  # it adds an end, no beginning
    assert tokenizer.bos_id is None
    backend = json.loads(tokenizer.hf.backend_tokenizer.to_str())
    opt = tmp_path / "opt"
    opt.mkdir()
    (opt / "vocab.json").write_text(json.dumps(backend["model"]["vocab"] | {"</s>": 500}))
    (opt / "merges.txt").write_text("\n".join(" ".join(pair) for pair in backend["model"]["merges"]))
    (opt / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>"}))
    assert Tokenizer(str(opt)).bos_id == 500


# Looking at the data


def test_table_1_against_a_direct_count(llama, tasks_dir, capsys):
    figures = data.main(["--preset", "pocket", "--llm", str(llama), "--tasks", str(tasks_dir), "--split", "class_to_class"])
    backend = Tokenizer(str(llama))
    table = json.loads((common.ROOT / "splits.json").read_text())["metaicl"]["settings"]["class_to_class"]
    out = capsys.readouterr().out
    for part, stem in (("train", "16384_100_train"), ("test", f"16_{SEEDS[0]}_test")):
        means, n = [], 0
        for path in sorted(tasks_dir.glob(f"*/*_{stem}.jsonl")):
            unique = {(e["input"], e["output"]) for e in map(json.loads, path.read_text().splitlines())}
            n += len(unique)
            means.append(np.mean([len(backend.reference(f" {x}")) + len(backend.reference(f" {y}")) for x, y in unique]))
        found = figures[part]
        assert (found["tasks"], found["of"], found["examples"]) == (len(means), len(table[part]), n)
        assert found["avg_len"] == pytest.approx(np.mean(means), abs=0.006)
        assert set(found["missing"]) == set(table[part]) - {p.name for p in tasks_dir.iterdir()}
        assert re.search(rf"meta-{part}: +{len(means)} of +{len(table[part])} tasks · +{n} examples", out)
    assert json.loads(out.splitlines()[-1]) == figures


def test_show_prints_one_examples_way(llama, tasks_dir, capsys):
    figures = data.main(["--preset", "pocket", "--llm", str(llama), "--tasks", str(tasks_dir), "--show", "1"])
    out = capsys.readouterr().out
    tasks, enc = load_tasks(str(tasks_dir), "class_to_class"), encoder(llama)
    demo, query = tasks.pool(tasks.train[0])[:2]
    assert figures == {"split": "class_to_class", "task": tasks.train[0]} == json.loads(out.splitlines()[-1])
    assert f"line of the file:\n  {json.dumps(query)}\n" in out
    for name, text in (("demonstrations D", f"{demo['input']} {demo['output']}"), ("query x", " " + query["input"]),
                       ("answer y", " " + query["output"])):
        ids = enc.tokenizer.reference(text) if name != "demonstrations D" else enc.demonstrations([demo], 900)
        assert f"{name}, {len(ids)} tokens:\n  text {text!r}\n  ids  {ids}\n" in out
    batch = collate([{"demo": enc.demonstrations([demo], 900), "queries": [enc.training_query(query)]}])
    for name, tensor in batch.items():
        assert f"batch[{name!r}] {tuple(tensor.shape)}:\n  {tensor.long().tolist()[0]}\n" in out


@pytest.mark.parametrize("k, message", [("0", "--show is 0"), ("60", "has .* examples, and --show 60 needs 61")])
def test_show_errors(llama, tasks_dir, k, message):
    with pytest.raises(UserError, match=message):
        data.main(["--preset", "pocket", "--llm", str(llama), "--tasks", str(tasks_dir), "--show", k])
