"""Made tasks: what a function gives, that options tell nothing, that nothing of the meta-test is trained
on."""

import collections

import numpy as np
import pytest
from conftest import read_lines

import data
import sources.tasks
import sources.text
import train_finetune
from common import ROOT, UserError
from sources import synthetic
from sources.functions import ADJECTIVES, DOMAINS, FORMS, NOUNS, VERBS, answers, inputs
from sources.synthetic import HELD_OUT, Early, Functions, Recall, example, parts_of
from sources.tasks import SEEDS


def test_a_held_out_function_is_trained_in_no_domain_and_no_form():
    tasks = Functions()
    held_out = {name for names in HELD_OUT.values() for name in names}
    assert not held_out & {parts_of(t)[1] for t in tasks.train}
    assert {parts_of(t)[1] for t in tasks.test} == held_out
    assert len(tasks.train) == len(set(tasks.train))


def test_the_parts_of_a_test_task_share_no_input_and_differ_by_seed():
    tasks = Functions()
    for task in tasks.test[::5]:
        parts = tasks.files(task, 13)
        xs = [e["input"] for part in parts.values() for e in part]
        assert len(xs) == len(set(xs)) and min(map(len, parts.values())) >= 16
        assert parts == tasks.files(task, 13) != tasks.files(task, 21)
        assert tasks.data_hash(task, 13) != tasks.data_hash(task, 21)


@pytest.mark.parametrize("tasks", [Functions(), Early()], ids=["functions", "early"])
def test_no_seeds_queries_have_selected_a_checkpoint(tasks):
    for task in tasks.test:
        parts = [tasks.files(task, seed) for seed in SEEDS]
        dev = {e["input"] for e in parts[0]["dev"]}
        assert len(dev) == 16 and all(p["dev"] == parts[0]["dev"] for p in parts)
        assert not any(e["input"] in dev for p in parts for e in p["test"] + p["train"])


@pytest.mark.parametrize("tasks, name", [(Functions(), "ratios-functions"), (Functions(), "functions-sets"),
                                         (Early(), "ratios-early"),
                                         (Early(), "early-segments")])
def test_committed_results_are_of_these_examples(tasks, name):
    for line in read_lines(ROOT / "results" / f"{name}.jsonl"):
        assert tasks.data_hash(line["task"], line["seed"]) == line["data_hash"], line["task"]


def test_early_evidence_has_as_many_as_are_asked_for():
    tasks = Early()
    for k, queries in ((16, 4), (32, 20)):
        for i in range(200):
            _, shown, asked = tasks.draw(np.random.default_rng(i), k, queries)
            assert (len(shown), len(asked)) == (k, queries)
    assert tasks.fit(16, 4) == tasks.train
    with pytest.raises(UserError, match="--tasks early has no pair .* --k 500 and --queries-per-demo 4"):
        tasks.draw(np.random.default_rng(0), 500, 4)


def test_the_first_queries_ask_for_pairs_from_everywhere():
    tasks = Recall(Words(2000), 28)
    places = [tasks.files(task, 100)["train"].index(q) for task in tasks.test
              for q in tasks.files(task, 100)["test"][:8]]
    assert 11 < np.mean(places) < 17 and min(places) < 4 and max(places) > 24


def test_more_demonstrations_leave_the_first_ones_and_the_queries_as_they_are():
    few, many = Functions(16), Functions(160)
    for task in ("trio: first", "date: month"):
        a, b = few.files(task, 13), many.files(task, 13)
        assert len(b["train"]) == 160 and b["train"][:32] == a["train"]
        assert (a["dev"], a["test"]) == (b["dev"], b["test"])
        assert len({e["input"] for part in b.values() for e in part}) == 160 + 16 + 32
    assert len(many.files("noun: plural", 13)["train"]) == 55  # of 103 inputs


def test_a_query_is_scored_among_different_answers_of_which_one_is_right():
    places = collections.Counter()
    tasks = Functions()
    for task in tasks.test[::2]:
        for e in tasks.files(task, 100)["test"]:
            assert e["output"] in e["options"] and len(set(e["options"])) == len(e["options"]) >= 6
            others = set(answers(parts_of(task)[0], e["input"]).values())
            assert set(e["options"]) <= others
            places[e["options"].index(e["output"])] += 1
    assert max(places.values()) < 0.3 * sum(places.values())


def test_an_example_in_another_form():
    e = example("noun: article, upper case", "child")
    assert e["output"] == "A CHILD" and all(o == o.upper() for o in e["options"])


def test_early_evidence_is_told_by_the_first_demonstrations_only():
    tasks = Early()
    for task in tasks.test:
        own, other = task.split(": ")[1].split(" / ")
        domain, parts = parts_of(task)[0], tasks.files(task, 42)
        demos = parts["train"]
        assert len(demos) == synthetic.N_SHOTS and len(parts["test"]) >= 16
        for i, e in enumerate(demos):
            assert e["output"] == DOMAINS[domain][own](e["input"])
            assert (e["output"] == DOMAINS[domain][other](e["input"])) == (i >= synthetic.N_TELLING)
        for e in parts["dev"] + parts["test"]:
            assert e["output"] != DOMAINS[domain][other](e["input"]) in e["options"]
        reverse = f"{domain}: {other} / {own}"
        assert reverse in tasks.test
        assert not {e["input"] for e in demos} & {e["input"] for e in parts["dev"] + parts["test"]}


def test_early_evidence_is_trained_on_pairs_of_functions_that_are_not_held_out():
    tasks, telling = Early(), collections.Counter()
    for i in range(60):
        task, demos, asked = tasks.draw(np.random.default_rng(i), 8, 3)
        domain, pair, form = parts_of(task)
        own, other = pair.split(" / ")
        assert not {own, other} & {*HELD_OUT[domain]} and task in tasks.train
        made = [{name: FORMS[form](y) for name, y in answers(domain, e["input"]).items()}
                for e in demos + asked]
        differ = [answer[own] != answer[other] for answer in made]
        told = differ.index(False)
        telling[told] += 1
        assert (len(demos), len(asked)) == (8, 3)
        assert differ == [True] * told + [False] * (8 - told) + [True] * 3
        assert [e["output"] for e in demos + asked] == [answer[own] for answer in made]
        assert all(answer[other] in e["options"] for answer, e in zip(made[8:], asked, strict=True))
    assert telling.keys() == {1, 2, 3, 4}


@pytest.mark.parametrize("name", ["functions", "recall"])
def test_k_is_drawn_where_a_least_is_given(llama, name):
    tasks, drawn = sources.tasks.load_tasks(name, "x", str(llama), 2 if name == "recall" else 8), []
    formatter = data.Formatter(sources.text.Tokenizer(str(llama)), "space", 900)
    tasks.draw = lambda rng, k, queries: drawn.append(k) or type(tasks).draw(tasks, rng, k, queries)
    rows = [data.sample_row(tasks, formatter, 1, i, 8, 2, least_k=3) for i in range(60)]
    assert {*drawn} == {3, 4, 5, 6, 7, 8} and all(len(row["queries"]) == 2 for row in rows)


KNOWN = [w for w in dict.fromkeys(NOUNS + VERBS + ADJECTIVES) if len(w) > 2]


class Words:
    """Stands for a Tokenizer: a vocabulary of English words after a space, and of pieces."""

    name = "words"

    def __init__(self, n: int):
        texts = [piece for w in KNOWN[:n] for piece in (f" {w}", w, f" {w[:2]}zq", f" {w.upper()}")]
        self.hf = type("Vocabulary", (), {"vocab_size": len(texts),
                                          "decode": staticmethod(lambda ids: texts[ids[0]])})


def test_recall_asks_for_pairs_that_the_demonstrations_hold_with_words_unseen_in_training():
    tasks = Recall(Words(200), 8)
    trained, tested = map(set, tasks.words)
    assert trained and tested and not trained & tested and trained | tested <= set(KNOWN)
    _, demos, queries = tasks.draw(np.random.default_rng(1), 8, 4)
    assert len(demos) == 8 and len({q["input"] for q in queries}) == 4 and all(q in demos for q in queries)
    assert {w for e in demos for w in (e["input"], e["output"])} <= trained
    parts = tasks.files("recall 3", 21)
    assert {w for e in parts["train"] for w in (e["input"], e["output"])} <= tested
    assert sorted(map(str, parts["dev"] + parts["test"])) == sorted(map(str, parts["train"]))
    assert all(len(set(e["options"])) == 8 and e["output"] in e["options"] for e in parts["train"])
    assert parts != tasks.files("recall 4", 21) and parts == tasks.files("recall 3", 21)


def test_recall_says_when_the_vocabulary_is_too_small():
    with pytest.raises(UserError, match="lower --k"):
        Recall(Words(40), 8)


def test_a_training_row_of_functions_has_k_demonstrations_of_the_query_s_function(llama):
    tasks, formatter = Functions(), data.Formatter(sources.text.Tokenizer(str(llama)), "newline", 900)
    rows, again = ([data.sample_row(tasks, formatter, 1, i, k=4, queries=2) for i in range(3)]
                   for _ in range(2))
    assert rows == again and rows[0] != rows[1]
    assert all(len(row["queries"]) == 2 and row["demo"] for row in rows)


def test_finetuning_on_recall_reads_no_file_and_builds_no_pool_before_it_draws(flags, tmp_path):
    argv = ["--tasks", "recall", "--template", "newline", "--k", "2", "--init-from", "none", "--steps", "2",
            "--batch-size", "2", "--out-dir", str(tmp_path / "run")]
    final = train_finetune.main([*flags, *argv])
    assert final["steps"] == 2 and np.isfinite(final["dev_option_ce"])
    with pytest.raises(UserError,
                       match=r"recall has 18 different examples, and --k 2 with --queries-per-demo 17"):
        train_finetune.main([*flags, *argv, "--queries-per-demo", "17"])
    tasks = Functions()
    assert min(map(tasks.size, tasks.train)) == len(inputs("adjective")) and not tasks.pools


def test_made_tasks_have_no_files_to_retrieve_from():
    for tasks in (Functions(), Early(), Recall(Words(200), 8)):
        with pytest.raises(UserError, match="leave --retrieve out"):
            tasks.retrieval_pool(tasks.test[0], 100)
