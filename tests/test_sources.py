"""Tests of sources: tokens against transformers' own, files, tasks, and the hub played by a stub."""

import gzip
import json
import random
from types import SimpleNamespace

import numpy as np
import pyarrow
import pytest
import tokenizers
from conftest import example, read_lines, sentencepiece, texts_of, write_lines, write_tasks
from pyarrow import parquet
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

import common
import sources.tasks
import sources.text
from common import UserError
from data import Corpus
from sources.synthetic import Early, Functions, parts_of
from sources.tasks import load_tasks, read_examples
from sources.text import Tokenizer

# Tokenizer
NASTY = ["", " ", "a", " a", "3", " 3", "12", " 12", "a12b", "a 12 b", "x  12", "x   7", "\n7", "\n\n7",
         " \n 7", "\t7", "  7  8  ", "3.5", "1,907", "½", "Ⅷ", "x²", "٣٤", " ٣", "naïve café", "cafe\u0301",
         "日本語 テキスト", "Ελληνικά", "👍", "👩‍👩‍👧‍👦 12", "🇩🇪🇫🇷", "a\u00a012", "\u3000\u30005", "\u2003x",
         "zero\u200bwidth", "\ufeffbom", "\x00", "\x01\x02\x1f\x7f", "a\x00b 5\x0c6", "\x85 7", "\r\n\r\n",
         "\n" * 60, " " * 70, " " * 69 + "x", "\n" * 9 + "5", " \t" * 20 + "9", "it's they'll",
         "IT'S 'S 's '12", "don’t", "'", "''s", "!!! ?!", "a_b-c", "<|endoftext|>",
         "a <|endoftext|> b<|endoftext|>7", "<|im_start|>user", "\u2028\u2029", "\U0010ffff",
         "the river " * 50]
ALPHABET = [*"aZéßж漢ع'’.,!-_<|>", "'s", "'ll", " the", *"0193", "½", "٣", "Ⅷ", "²",
            *" \n\t\r\x00\x1f\x0b\u00a0\u3000\u200b", "  ", "\n\n", "🙂", "👍🏽", "\u0301", "<|endoftext|>"]


def random_texts(seed: int, n: int) -> list[str]:
    """Random strings; half of them mostly white space and digits, where pre-tokenizers differ most."""
    rng = random.Random(seed)
    spaces_and_digits = [*"0123456789", *" \n\t\u00a0", "  ", "a", "'s", "."]
    return ["".join(rng.choices(rng.choice([ALPHABET, spaces_and_digits]), k=rng.randint(1, 40)))
            for _ in range(n)]


def train_tokenizer(folder, digits: bool, texts: list[str], lacking=(), vocab_size: int = 600) -> Tokenizer:
    """A byte-level BPE tokenizer whose merges come from `texts`, saved and read again."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                     byte_level]) if digits else byte_level
    backend.decoder = decoders.ByteLevel()
    alphabet = [c for c in pre_tokenizers.ByteLevel.alphabet() if c not in lacking]
    assert len(alphabet) == 256 - len(lacking)
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet,
                                                           show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)
    return Tokenizer(str(folder))


def assert_like_transformers(tokenizer: Tokenizer, texts: list[str]) -> None:
    assert tokenizer.encoding is not None
    for text in texts:
        assert tokenizer.encode(text) == tokenizer.reference(text), repr(text)


def tasks_of(folder, train: dict, test: dict, split: str = "class_to_class"):
    return load_tasks(str(write_tasks(folder, train, test)), split)


def test_tiktoken_gives_transformers_ids(llm_folder):
    assert_like_transformers(Tokenizer(str(llm_folder)), NASTY + random_texts(0, 1500))


@pytest.mark.parametrize("digits", [False, True])
def test_tiktoken_gives_transformers_ids_where_white_space_and_digits_merge(tmp_path, digits):
    """The tiny models have no token of two spaces: a wrong split would not show there."""
    tokenizer = train_tokenizer(tmp_path, digits, random_texts(1, 2000))
    assert {"ĠĠ", "ĊĊ"} <= tokenizer.hf.get_vocab().keys()
    assert_like_transformers(tokenizer, NASTY + random_texts(0, 3000))


def test_special_tokens_in_a_text_are_plain_text(llm_folder):
    tokenizer = Tokenizer(str(llm_folder))
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.hf.eos_token_id not in ids and tokenizer.bos == []
    assert tokenizer.hf.backend_tokenizer.decode(ids, skip_special_tokens=False) == "a<|endoftext|>b"


def test_digits_are_split_one_by_one_only_where_the_tokenizer_says_so(gpt2, llama):
    vocabulary = Tokenizer(str(gpt2)).hf.get_vocab()
    assert "12" in vocabulary or "Ġ12" in vocabulary  # else this could not fail
    assert len(Tokenizer(str(llama)).encode("1907")) == 4
    assert len(Tokenizer(str(gpt2)).encode(" 12")) == 1


@pytest.mark.parametrize("digits", [False, True])
def test_a_byte_that_the_vocabulary_lacks_is_dropped(tmp_path, digits):
    # as byte-level BPE writes these bytes
    missing = {"\x00": chr(256), "\x01": chr(257), "\x7f": chr(256 + 33)}
    tokenizer = train_tokenizer(tmp_path, digits, ["a small boat 12 17"] * 9, missing.values(), 300)
    for character in missing:
        assert tokenizer.encode(character) == tokenizer.reference(character) == []
        assert tokenizer.encode(f"a{character}") == tokenizer.encode("a") != []
    rng = random.Random(3)
    assert_like_transformers(tokenizer, [
        "".join(rng.choices([*missing, *"a boat12\n", "🙂"], k=rng.randint(1, 30))) for _ in range(500)])


def test_another_kind_of_tokenizer_takes_transformers_way(word_tokenizer):
    assert word_tokenizer.encoding is None
    assert word_tokenizer.encode("a boat zz sad") == [2, 3, 0, 4]
    assert word_tokenizer.bos == [1]


@pytest.mark.parametrize("pre, understood", [
    ({"type": "ByteLevel", "add_prefix_space": True}, False), ({"type": "Metaspace"}, False), ({}, False),
    ({"type": "Sequence", "pretokenizers": []}, False),
    ({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": False},
                                            {"type": "ByteLevel", "add_prefix_space": False}]}, False),
    ({"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": "x+"}},
                                            {"type": "ByteLevel", "add_prefix_space": False,
                                             "use_regex": False}]}, "x+"),
    ({"type": "ByteLevel", "add_prefix_space": False}, True)])
def test_only_understood_pre_tokenizers_go_through_tiktoken(pre, understood):
    pattern = sources.text.split_pattern(pre)
    assert pattern == understood if isinstance(understood, str) else (pattern is not None) == understood


def test_unknown_tokenizer_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no tokenizer at"):
        Tokenizer(str(tmp_path / "nothing"))
    ByT5Tokenizer().save_pretrained(tmp_path / "byt5")  # of bytes, in Python alone
    with pytest.raises(UserError, match="no tokenizer at .*byt5 .*backend_tokenizer"):
        Tokenizer(str(tmp_path / "byt5"))


def test_exact_duplicates_leave_the_pool(tmp_path, tasks_dir):
    lines = [example("a"), example("b"), example("a"), example("a", "sad"), example("b")]
    pool = tasks_of(tmp_path, {"emotion": lines}, {"ag_news": [example("q")]}).pool("emotion")
    assert [(e["input"], e["output"]) for e in pool] == [("a", "happy"), ("b", "happy"), ("a", "sad")]


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


@pytest.mark.parametrize("content", [gzip.compress(b'{"text": "fine"}\n' * 500)[:-9], b"no gzip",
                                     b"\x1f\x8b" + b"x" * 40, gzip.compress(b'{"text": "caf\xe9"}\n')],
                         ids=["cut", "plain", "garbled", "latin-1"])
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


def test_present_and_missing_tasks(tiny_tasks):
    table = json.loads((common.ROOT / "splits.json").read_text())["metaicl"]["settings"]["class_to_class"]
    train, test = {"emotion", "glue-sst2", "trec", "rotten_tomatoes", "sms_spam"}, {"ag_news", "emo"}
    assert (set(tiny_tasks.train), set(tiny_tasks.test), tiny_tasks.collection) == (train, test, "metaicl")
    assert set(tiny_tasks.missing_train) == set(table["train"]) - train
    assert set(tiny_tasks.missing_test) == set(table["test"]) - test


def test_sick_is_evaluated_and_not_trained_on(tmp_path):
    one = [example("a")]
    tasks = tasks_of(tmp_path, {"sick": one, "ag_news": one}, {"sick": one}, "non_nli_to_nli")
    assert (tasks.train, tasks.test) == (["ag_news"], ["sick"])


@pytest.mark.parametrize("split", common.SPLITS)
def test_no_task_is_both_trained_on_and_tested(tmp_path, split):
    setting = json.loads((common.ROOT / "splits.json").read_text())["metaicl"]["settings"][split]
    train, test = (dict.fromkeys(setting[side], [example("a")]) for side in ("train", "test"))
    tasks = tasks_of(tmp_path, train, test, split)
    assert not set(tasks.train) & set(tasks.test) and set(tasks.test) == set(setting["test"])
    assert set(setting["train"]) - set(tasks.train) <= {"sick"}


def test_load_tasks_errors(tmp_path, tasks_dir):
    with pytest.raises(UserError, match="does not exist; give metaicl, bigbench, or a folder"):
        load_tasks(str(tmp_path / "nothing"), "class_to_class")
    (tmp_path / "my_task").mkdir()
    with pytest.raises(UserError, match="holds no task; expected files NAME.jsonl.* or MetaICL's NAME/"):
        load_tasks(str(tmp_path), "class_to_class")
    with pytest.raises(UserError, match="of qa_to_qa"):
        load_tasks(str(tasks_dir), "qa_to_qa")


def test_functions_are_found_by_their_folders_and_none_is_trained_on(tmp_path):
    one = [example("a")]
    names = ["list_functions-c001", "mult_data_wrangling-login_1_names_1"]
    others = dict.fromkeys(["gem-xsum", "word_sorting", "list_functions", "emo"], one)
    (tmp_path / "list_functions-empty").mkdir()
    tasks = tasks_of(tmp_path, {"gem-xsum": one}, dict.fromkeys(names, one) | others, "functions")
    assert (tasks.train, tasks.test, tasks.collection) == ([], names, "bigbench")
    assert (tasks.missing_train, tasks.missing_test) == ([], ["list_functions-empty"])
    assert set(tasks.types.values()) == {"multi-choice"}  # the headline is accuracy
    with pytest.raises(UserError, match="0 of 0 meta-test tasks of functions; expected folders such as "
                                        ".*/list_functions-c001/list_functions-c001_16_100_test.jsonl"):
        tasks_of(tmp_path / "other", {}, {"emo": one}, "functions")


def test_files_of_a_seed(tiny_tasks):
    files = tiny_tasks.files("ag_news", 13)
    assert {part: len(examples) for part, examples in files.items()} == {"train": 16, "dev": 16, "test": 24}
    path = tiny_tasks.folder / "ag_news" / "ag_news_16_13_test.jsonl"
    assert files["test"] == read_lines(path)
    with pytest.raises(UserError, match="no files of seed 7; MetaICL's seeds are 13, 21, 42, 87, 100"):
        tiny_tasks.files("ag_news", 7)


def test_data_hash_follows_the_content(tmp_path):
    one = [example("b")]
    tasks = tasks_of(tmp_path, {"emotion": one}, {"ag_news": one, "emo": one})
    before = tasks.data_hash("ag_news", 100)
    assert tasks.data_hash("emo", 100) == before
    for part in ("train", "dev", "test"):
        path = tmp_path / "ag_news" / f"ag_news_16_100_{part}.jsonl"
        whole = path.read_text()
        path.write_text(whole.replace('"b"', '"c"'))
        assert tasks.data_hash("ag_news", 100) != before
        path.write_text(whole)


def test_retrieval_pool(tmp_path):
    """All seeds' training files, or 100-shot files; nothing twice, no dev or test question."""
    tasks, emo = tasks_of(tmp_path, {"emotion": [example("a")]}, {"emo": [example("a")]}), tmp_path / "emo"
    for seed, train in ((13, ["a", "b", "dev 13"]), (42, ["b", "c", "test"]), (100, ["d", "dev 42"])):
        write_lines(emo / f"emo_16_{seed}_train.jsonl", [example(text) for text in train])
        write_lines(emo / f"emo_16_{seed}_dev.jsonl", [example(f"dev {seed}")])
        # asks the same with another answer
        write_lines(emo / f"emo_16_{seed}_test.jsonl", [example("test", "sad")])
    write_lines(emo / "emo_16384_100_train.jsonl", [example("never")])
    assert sorted(e["input"] for e in tasks.retrieval_pool("emo", 13)) == ["a", "b", "c", "d", "dev 42"]
    assert sorted(e["input"] for e in tasks.retrieval_pool("emo", 42)) == ["a", "b", "c", "d", "dev 13"]
    for seed in (13, 21):
        shots = [example(text) for text in (f"shot {seed}", "test", "both")]
        write_lines(emo / f"emo_100_{seed}_train.jsonl", shots)
    assert [e["input"] for e in tasks.retrieval_pool("emo", 13)] == ["shot 13", "both", "shot 21"]


def test_data_hash_of_retrieval_covers_the_pool(tmp_path):
    tasks, hashes = tasks_of(tmp_path, {"emotion": [example("a")]}, {"emo": [example("a")]}), []
    for name, text in (("emo_16_13", "x"), ("emo_16_13", "y"), ("emo_100_13", "z")):
        write_lines(tmp_path / "emo" / f"{name}_train.jsonl", [example(text)])
        hashes.append((tasks.data_hash("emo", 100), tasks.data_hash("emo", 100, retrieval=True)))
    assert len({plain for plain, _ in hashes}) == 1 and len({pool for _, pool in hashes}) == 3


@pytest.mark.parametrize("line, message", [
    ('{"task": "t", "input": "a"', "line 2: expected"), ('{"task": "t", "input": "a"}', "KeyError"),
    ("[]", "TypeError"), ('{"task": "t", "input": 3, "output": "x"}', "AttributeError"),
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
    """datasets.load_dataset gives these rows, or raises them; holds what was asked for."""
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
                "meta_eval": [row("emo", f"{part} {seed}", seed, part) for seed in ("13", "100")
                              for part in ("train", "dev", "test")],
                "meta_eval_100shot": [row("emo", f"shot {seed} {i}", seed, "train") for seed in ("13", "100")
                                      for i in range(3)]}
    whole = hub.rows["meta_eval"]
    hub.rows["meta_eval"] = [*whole[:2], KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):  # half of it must not be taken for all of it
        load_tasks("metaicl", "class_to_class")
    hub.rows["meta_eval"] = whole
    tasks = load_tasks("metaicl", "class_to_class")
    assert (tasks.train, tasks.test) == (["emotion"], ["emo"])
    assert tasks.pool("emotion") == [example("a", task="emotion"), example("b", task="emotion")]
    for seed in (13, 100):
        assert tasks.files("emo", seed) == {p: [example(f"{p} {seed}", task="emo")]
                                            for p in ("train", "dev", "test")}
        shots = [example(f"shot {s} {i}", task="emo") for s in (100, 13) for i in range(3)]
        assert tasks.retrieval_pool("emo", seed) == shots
    n = len(hub.asked)
    assert set(hub.asked) == {(sources.text.HUB_TASKS, split) for split in hub.rows}
    assert load_tasks("metaicl", "class_to_class").train == ["emotion"] and len(hub.asked) == n


def test_c4_comes_from_the_hub_once(hub, corpus_dir, tokenizer):
    hub.rows = {"validation": [{"text": text} for text in texts_of(corpus_dir)]}
    corpus = Corpus(["c4"], tokenizer, 128, 64)
    assert np.array_equal(corpus.tokens, Corpus([str(corpus_dir)], tokenizer, 128,
                                                64).tokens) and corpus.name == "c4"
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
    write_parquet(local_hub[0], "meta_eval", [row("emo", f"{part} {seed}", seed, part)
                                              for seed in ("13", "100") for part in ("train", "dev", "test")])
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
            file.writelines(json.dumps({"text": text, "timestamp": "2019-04-25T12:57:54Z",
                                        "url": "http://a"}) + "\n" for text in texts)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files:\n  - split: train\n    path: en/c4-train.*.json.gz\n"
        "  - split: validation\n    path: en/c4-validation.*.json.gz\n---\n")
    assert np.array_equal(Corpus(["c4"], tokenizer, 128, 64).tokens,
                          Corpus([str(corpus_dir)], tokenizer, 128, 64).tokens)


def test_another_revision_of_c4_is_tokenised_anew(hub, corpus_dir, tokenizer, monkeypatch):
    hub.rows = {"validation": [{"text": text} for text in texts_of(corpus_dir)]}
    first = Corpus(["c4"], tokenizer, 128, 64)
    monkeypatch.setitem(sources.text.HUB_REVISIONS, sources.text.HUB_TEXT, "0" * 40)
    assert Corpus(["c4"], tokenizer, 128, 64).hash != first.hash and len(hub.asked) == 2


def test_hub_errors_name_the_offline_way(hub, local_hub, tokenizer):
    offline = "give a local folder in place of {}, or add --preset pocket after `make assets`"
    for rows, message in (([ConnectionError("no route")], "ConnectionError: no route"),
                          ([{"texts": "x"}], "no column text among"), ([OSError()], "OSError")):
        hub.rows = {"validation": rows}
        with pytest.raises(UserError, match="--corpus c4: .*c4, revision abc, split validation cannot be "
                                            f"read.*{message}.*" + offline.format("c4")):
            Corpus(["c4"], tokenizer, 128, 64)
        assert not list(common.CACHE.glob("corpus-*/about.json"))


def test_a_data_set_that_is_not_there_names_the_offline_way(local_hub):
    with pytest.raises(UserError, match="--tasks metaicl: .*EvalMetaICLAll, revision main, split meta_train "
                                        "cannot be read.*give a local folder in place of metaicl"):
        load_tasks("metaicl", "class_to_class")
    assert not [path for path in common.CACHE.glob("metaicl*") if path.suffix != ".tmp"]


def test_a_bos_is_taken_where_the_tokenizer_adds_one(tmp_path, corpus_dir, tokenizer):
    assert sentencepiece(tmp_path, corpus_dir, "llama2").bos == [1]
    assert sentencepiece(tmp_path, corpus_dir, "t5").bos == []  # it adds an end, no beginning
    assert tokenizer.bos == []
    backend = json.loads(tokenizer.hf.backend_tokenizer.to_str())
    opt = tmp_path / "opt"
    opt.mkdir()
    (opt / "vocab.json").write_text(json.dumps(backend["model"]["vocab"] | {"</s>": 500}))
    (opt / "merges.txt").write_text("\n".join(" ".join(pair) for pair in backend["model"]["merges"]))
    (opt / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer",
                                                           "add_bos_token": True, "bos_token": "</s>",
                                                           "eos_token": "</s>", "unk_token": "</s>"}))
    assert Tokenizer(str(opt)).bos == [500]


def test_a_mixture_passes_on_to_its_collections():
    functions, early = Functions(), Early()
    tasks = load_tasks(["functions", "early"], "class_to_class")
    assert tasks.collection == "functions early" and tasks.test == functions.test + early.test
    drawn = {tasks.draw(np.random.default_rng(i), 4, 2)[0] for i in range(20)}
    assert len(drawn & {*functions.train}) > 3 < len(drawn & {*early.train})
    task, noun = early.test[0], functions.test[0]
    assert tasks.files(task, 13) == early.files(task, 13) and tasks.partner(task, tasks.test) == early.test[1]
    assert tasks.data_hash(task, 13) == early.data_hash(task, 13)
    assert parts_of(tasks.partner(noun, tasks.test))[0] == "noun" != tasks.partner(noun, tasks.test)


def test_a_mixture_draws_from_each_collection_as_often(llama):
    tasks = sources.tasks.load_tasks(["functions", "recall"], "class_to_class", str(llama), 2)
    drawn = [tasks.draw(np.random.default_rng(i), 2, 2)[0] for i in range(200)]
    assert 70 < drawn.count("recall") < 130 and {*drawn} - {"recall"} <= set(Functions().train)
