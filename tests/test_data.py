"""Tests of data.py: templates by their text, batches against a slow search, samples, windows of text."""

import json
import random
import re
from collections import Counter
from itertools import chain
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import example, sentencepiece, texts_of, write_tasks

import common
import paper.collection as printed
from common import UserError
from data import MAX_INPUT, Corpus, Formatter, collate, sample_row, step_rows
from sources.tasks import SEEDS, load_tasks
from sources.template import TEMPLATES
from sources.text import Tokenizer


def formatter(folder, template="space", **kw) -> Formatter:
    return Formatter(Tokenizer(str(folder)), template, **({"context_len": 900} | kw))


def text_of(enc: Formatter, ids: list[int]) -> str:
    return enc.tokenizer.hf.backend_tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("template, expected", [
    ("space", "the river happy cold boat 12 sad"), ("newline", "the river\nhappy\n\n\ncold boat 12\nsad")])
def test_template_text(llm_folder, template, expected):
    enc = formatter(llm_folder, template)
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
    enc = formatter(llm_folder)
    long = " ".join(str(i) for i in range(1000))
    whole = enc.tokenizer.encode(" " + long)
    assert enc.query(example(long)) == whole[:MAX_INPUT] and len(whole) > MAX_INPUT == 256
    assert enc.answer(long) == whole
    x, (y,) = enc.training_query(example("short", long))
    assert (x, y) == (enc.tokenizer.encode(" short"), whole)


def pieces(enc: Formatter, demos: list[dict]) -> list[list[int]]:
    """Token ids of each demonstration, the first one without separator, from the template's text."""
    before_answer, between = TEMPLATES[enc.template]
    return [enc.tokenizer.encode((between if i else "") + e["input"])
            + enc.tokenizer.encode(before_answer + e["output"]) for i, e in enumerate(demos)]


def test_demonstrations_stop_at_the_first_that_would_pass_the_limit_and_never_split(llama):
    enc = formatter(llama)
    demos = [example("boat " * n, "sad") for n in (3, 5, 40, 1, 2)]
    parts = pieces(enc, demos)
    ends = np.cumsum([len(part) for part in parts])
    assert len(parts[2]) > len(parts[3])  # a shorter one after the one that does not fit is left out as well
    for limit in range(len(parts[0]), ends[-1] + 2):
        fit = int((ends <= limit).sum())
        assert enc.demonstrations(demos, limit) == [*chain(*parts[:fit])], limit


def test_one_demonstration_too_long_alone_is_skipped(llama):
    enc = formatter(llama)
    demos = [example("boat " * 60), example("the river", "sad"), example("cold")]
    rest = enc.demonstrations(demos[1:], 900)
    assert enc.demonstrations(demos, len(rest)) == rest
    with pytest.raises(UserError, match="task t: not one of 3 demonstrations fits into 1 tokens"):
        enc.demonstrations(demos, 1)


def test_budget_holds_at_most_l_tokens_and_keeps_a_label(llm_folder):
    enc = formatter(llm_folder)
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
    ("newline", "happy\n\n\nsad\n\n\nok\n\n\nhappy",
     "the river\n\n\ncold boat 12\n\n\nlate ships\n\n\nbread"),
    ("input-output", "Output: happy\nOutput: sad\nOutput: ok\nOutput: happy",
     "Input: the river\nInput: cold boat 12\nInput: late ships\nInput: bread")])
def test_demonstrations_without_input_or_label(llm_folder, template, no_input, no_label):
    enc = formatter(llm_folder, template)
    demos = [example("the river"), example("cold boat 12", "sad"), example("late ships", "ok"),
             example("bread")]
    assert text_of(enc, enc.demonstrations([e | {"input": ""} for e in demos], 900)) == no_input
    assert text_of(enc, enc.demonstrations([e | {"output": ""} for e in demos], 900)) == no_label
    # a demonstration is read in the same tokens wherever it stands
    for without in ({"input": ""}, {"output": ""}):
        parts = [enc.demonstration(e | without, first=i == 0) for i, e in enumerate(demos)]
        assert enc.demonstrations([e | without for e in demos], 900) == [*chain(*parts)]
    # cut, it keeps the label it was given, and none where that was taken away
    spoiled = example("boat " * 40, "ok")
    assert enc.budget([spoiled], 12)[-len(enc.answer("ok")):] == enc.answer("ok")
    assert enc.budget([spoiled | {"output": ""}], 12) == enc.query(spoiled, first=True)[:12]


def test_a_batch_goes_to_whatever_device_is_asked_for():
    batch = collate([{"demo": [1, 2], "queries": [([3], [[4]])]}], "meta")  # as mps does, none of CUDA's
    assert {t.device.type for t in batch.values()} == {"meta"}


LABELS = ["ok", "a much longer label of many tokens", "sad"]


@pytest.mark.parametrize("context_len, distill_len, llm_positions, distiller_positions", [
    (900, 100, 1024, 1024), (900, 4, 640, 640), (900, 200, 2048, 1024), (50, 100, 1024, 1024),
    (900, 8, None, None), (900, 8, None, 512), (900, 100, 512, None)])
def test_limit_is_the_formula_of_appendix_a(llama, context_len, distill_len, llm_positions,
                                            distiller_positions):
    enc = formatter(llama, context_len=context_len, distill_len=distill_len, llm_positions=llm_positions,
                  distiller_positions=distiller_positions)
    examples = [example("boat", "ok", LABELS), example("river", "sad", ["sad"])]
    longest = max(len(enc.tokenizer.reference(" " + label)) for label in LABELS)
    infinite = 10 ** 9
    assert enc.limit(examples) == min(context_len, (distiller_positions or infinite) - distill_len,
                                      (llm_positions or infinite) - 256 - longest)


def test_limit_leaves_room_for_bos(word_tokenizer):
    enc = Formatter(word_tokenizer, "space", context_len=900, llm_positions=300)
    assert enc.limit([example("a", "sad boat", ["sad boat"])]) == 300 - 256 - 2 - 1


def test_limit_is_fixed_per_task_and_every_query_fits(llm_folder, tasks_dir):
    enc = formatter(llm_folder, distill_len=4, llm_positions=400, distiller_positions=200)
    tasks = load_tasks(str(tasks_dir), "class_to_class")
    for task in tasks.train:
        limit = tasks.limit(task, enc.limit)
        pool = tasks.pool(task)
        assert limit == enc.limit(pool) == enc.limit(pool[::-1]) == tasks.limit(task, enc.limit)
        for seed in range(20):
            row = sample_row(tasks, enc, seed, 0, 16, 4)
            assert len(row["demo"]) + enc.distill_len <= 200
            assert all(len(row["demo"]) + 256 + len(y) <= 400 for _, (y,) in row["queries"])


def random_rows(rng: random.Random) -> list[dict]:
    def ids(low: int, high: int) -> list[int]:
        return [rng.randint(1, 400) for _ in range(rng.randint(low, high))]
    n_options = rng.choice([0, 1, 4])
    return [{"demo": ids(0, 9),
             "queries": [(ids(1, 7), [ids(1, 4) for _ in range(rng.randint(min(1, n_options), n_options))])
                                            for _ in range(rng.randint(1, 4))]}
            for _ in range(rng.randint(1, 5))]


def slow_row(row: dict) -> list[dict]:
    """The tokens of a row; predictors are found by search among what a token may see."""
    tokens = []
    for query, (x, options) in enumerate(row["queries"]):
        tokens += [{"id": t, "query": query, "branch": 0, "position": i} for i, t in enumerate(x)]
        for branch, option in enumerate(options, 1):
            tokens += [{"id": t, "query": query, "branch": branch, "position": len(x) + i}
                       for i, t in enumerate(option)]
    for token in tokens:
        seen = [column for column, other in enumerate(tokens) if other["query"] == token["query"]
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
    names = {"query_ids": "id", "query": "query", "branch": "branch", "position": "position",
             "predictor": "predictor"}
    assert batch.keys() == {"demo_ids", "demo_mask", "part_ids", "part_mask", "query_mask", *names}
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
    # also in the padding: gather reads there
    assert batch["predictor"].min() >= 0 and batch["predictor"].max() <= T


class Named:
    """Stands in for Formatter: rows hold the examples themselves."""

    @staticmethod
    def limit(examples):
        return 900

    @staticmethod
    def pieces(examples, limit):
        return [(e, [(e["task"], e["input"], e["output"])]) for e in examples]

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
    # tasks are drawn evenly: 40 each
    assert drawn.keys() == set(tiny_tasks.train) and min(drawn.values()) > 20


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
    """Padding of batches of eight: over 40% as drawn, under 10% by length; steps are in no order."""
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
    with pytest.raises(UserError,
                       match=rf"0 of 60 documents have at least 5000.*longest has {longest}.*--min-doc-len"):
        Corpus([str(corpus_dir)], tokenizer, 128, 5000)


def test_table_1_and_show_without_training_tasks(tmp_path, llama, capsys):
    write_tasks(tmp_path, {}, {"list_functions-c001": [example("a")]})
    argv = ["--preset", "pocket", "--llm", str(llama), "--tasks", str(tmp_path), "--split", "functions"]
    figures = printed.main(argv)
    assert figures["train"] == {"tasks": 0, "of": 0, "examples": 0, "avg_len": 0.0, "missing": []}
    assert figures["test"]["tasks"] == figures["test"]["of"] == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    with pytest.raises(UserError, match="--show needs a meta-training task, and functions has none"):
        printed.main([*argv, "--show", "1"])


@pytest.mark.parametrize("kind", ["t5", "llama2"])
def test_pieces_of_text_have_the_tokens_of_the_whole(tmp_path, corpus_dir, kind):
    """A demonstration is put together from pieces: no second space may come in where they join."""
    tokenizer = sentencepiece(tmp_path, corpus_dir, kind)
    assert tokenizer.encoding is None
    text = texts_of(corpus_dir)[0]
    for cut in [i for i, c in enumerate(text) if c == " "][:20]:
        assert tokenizer.encode(text[:cut]) + tokenizer.encode(text[cut:]) == tokenizer.reference(text)
    formatter = Formatter(tokenizer, "space", 900)
    demos = [example("the river is cold", "happy"), example("a small boat", "sad")]
    assert formatter.demonstrations(demos,
                                  900) == tokenizer.reference("the river is cold happy a small boat sad")


def test_newlines_that_a_tokenizer_drops_are_an_error_and_others_are_kept(tmp_path, corpus_dir, tokenizer):
    message = "--template newline, but the tokenizer of .*t5 drops newlines.*--template space"
    with pytest.raises(UserError, match=message):
        Formatter(sentencepiece(tmp_path, corpus_dir, "t5"), "newline", 900)
    llama2 = sentencepiece(tmp_path, corpus_dir, "llama2")
    for kept in (llama2, tokenizer):
        ids = Formatter(kept, "newline", 900).demonstrations([example("the river", "happy"),
                                                            example("a boat", "sad")], 900)
        assert ids == kept.reference("the river\nhappy\n\n\na boat\nsad")


def test_table_1_against_a_direct_count(llama, tasks_dir, capsys):
    figures = printed.main(["--preset", "pocket", "--llm", str(llama), "--tasks", str(tasks_dir), "--split",
                            "class_to_class"])
    backend = Tokenizer(str(llama))
    table = json.loads((common.ROOT / "splits.json").read_text())["metaicl"]["settings"]["class_to_class"]
    out = capsys.readouterr().out
    for part, stem in (("train", "16384_100_train"), ("test", f"16_{SEEDS[0]}_test")):
        means, n = [], 0
        for path in sorted(tasks_dir.glob(f"*/*_{stem}.jsonl")):
            unique = {(e["input"], e["output"]) for e in map(json.loads, path.read_text().splitlines())}
            n += len(unique)
            means.append(np.mean([len(backend.reference(f" {x}")) + len(backend.reference(f" {y}"))
                                  for x, y in unique]))
        found = figures[part]
        assert (found["tasks"], found["of"], found["examples"]) == (len(means), len(table[part]), n)
        assert found["avg_len"] == pytest.approx(np.mean(means), abs=0.006)
        assert set(found["missing"]) == set(table[part]) - {p.name for p in tasks_dir.iterdir()}
        assert re.search(rf"meta-{part}: +{len(means)} of +{len(table[part])} tasks · +{n} examples", out)
    assert json.loads(out.splitlines()[-1]) == figures


def test_show_prints_one_examples_way(llama, tasks_dir, capsys):
    figures = printed.main(["--preset", "pocket", "--llm", str(llama), "--tasks", str(tasks_dir),
                            "--show", "1"])
    out = capsys.readouterr().out
    tasks, enc = load_tasks(str(tasks_dir), "class_to_class"), formatter(llama)
    demo, query = tasks.pool(tasks.train[0])[:2]
    assert figures == {"split": "class_to_class", "task": tasks.train[0]} == json.loads(out.splitlines()[-1])
    assert f"line of the file:\n  {json.dumps(query)}\n" in out
    for name, text in (("demonstrations D", f"{demo['input']} {demo['output']}"),
                       ("query x", " " + query["input"]), ("answer y", " " + query["output"])):
        ids = enc.tokenizer.reference(text) if name != "demonstrations D" else enc.demonstrations([demo], 900)
        assert f"{name}, {len(ids)} tokens:\n  text {text!r}\n  ids  {ids}\n" in out
    batch = collate([{"demo": enc.demonstrations([demo], 900), "queries": [enc.training_query(query)]}])
    for name, tensor in batch.items():
        assert f"batch[{name!r}] {tuple(tensor.shape)}:\n  {tensor.long().tolist()[0]}\n" in out


@pytest.mark.parametrize("k, message", [("0", "--show is 0"),
                                        ("60", "has .* examples, and --show 60 needs 61")])
def test_show_errors(llama, tasks_dir, k, message):
    with pytest.raises(UserError, match=message):
        printed.main(["--preset", "pocket", "--llm", str(llama), "--tasks", str(tasks_dir), "--show", k])


@pytest.mark.parametrize("positions", [300, 640, 1024, 8192, None])
def test_room_is_exact_or_enough(llm_folder, positions):
    """No label is encoded where even 16 tokens a byte would leave room."""
    enc = Formatter(Tokenizer(str(llm_folder)), "space", 400, 8, positions)
    examples = [example("the river", "music"), example("cold boat", "war " * 9, ("war " * 9, "café"))]
    exact = (positions or 1 << 20) - MAX_INPUT - len(enc.answer("war " * 9))
    for needed in (10, 400, 700):
        found = enc.room(examples, needed)
        assert found == exact or needed <= found < exact
    with mock.patch.object(Formatter, "answer", side_effect=AssertionError("encoded")):
        if positions in (8192, None):
            assert enc.limit(examples) == 400
        else:
            with pytest.raises(AssertionError, match="encoded"):
                enc.limit(examples)
