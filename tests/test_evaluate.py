"""Tests of evaluate.py: its results file, stop and resume, controls, changed demonstrations, errors."""

import json
import random
import shutil
import threading
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_distiller, model_of, read_lines, save_distiller, write_lines

import common
import evaluate
import loading
import model
import paper.demos
import paper.summary
import run
import score
import sources.tasks
from common import UserError
from data import Formatter
from model import demo_prefix
from paper.controls import partners
from paper.demos import PERTURBATIONS, bm25_neighbours, perturb
from sources.tasks import SEEDS, Tasks, load_tasks
from sources.template import TEMPLATES
from sources.text import Tokenizer, llm_hash

CPU = torch.device("cpu")
METHODS = ["zero_shot", "icl", "icl_budget", "last_l", "mend"]


@pytest.fixture(scope="module")
def checkpoint(llama_llm, tmp_path_factory) -> Path:
    """A run folder as training leaves it, of an untrained distiller with l = 4."""
    return write_run(tmp_path_factory.mktemp("runs") / "finetune-tiny", llama_llm)


def write_run(folder: Path, llm, spec: str = "layers:2", seed: int = 0, **stages) -> Path:
    return save_distiller(folder, make_distiller(llm, spec, seed=seed), llm, spec, trained_on=stages)


@pytest.fixture
def argv(llama, tasks_dir, checkpoint, tmp_path) -> list[str]:
    return ["--preset", "pocket", "--llm", str(llama), "--tasks", str(tasks_dir), "--device", "cpu",
            "--dtype", "fp32", "--checkpoint", str(checkpoint), "--k", "4", "--limit", "8", "--seeds", "13",
            "42", "--methods", *METHODS, "--out", str(tmp_path / "results.jsonl")]


@pytest.fixture
def scored(argv, tmp_path):
    """(flags) -> the lines of the results file after a run with these, too."""
    def scored(*more: str) -> list[dict]:
        evaluate.main([*argv, *more])
        return read_lines(tmp_path / "results.jsonl")
    return scored


ONE = ["--only", "emo", "--seeds", "13"]


@pytest.fixture
def own_tasks(tasks_dir, tmp_path) -> Path:
    """A copy of the tasks, to be changed."""
    return shutil.copytree(tasks_dir, tmp_path / "tasks")


@pytest.mark.parametrize("method", METHODS)
def test_only_zero_shot_ignores_the_demonstrations(setting, own_tasks, monkeypatch, method):
    for part in ("dev", "test"):  # seed 21 gets the queries of seed 13; its demonstrations stay others
        shutil.copy(own_tasks / "emo" / f"emo_16_13_{part}.jsonl",
                    own_tasks / "emo" / f"emo_16_21_{part}.jsonl")
    tasks = load_tasks(str(own_tasks), "class_to_class")
    args = SimpleNamespace(k=16, limit=0, distill_len=24, dtype="fp32", retrieve=None, perturb=None)
    scores, scoring = [], score.score_options
    monkeypatch.setattr(score, "score_options", lambda *a: scores.append(scoring(*a)) or scores[-1])
    monkeypatch.setattr(score, "PASS_TOKENS", {"cpu": 100_000, "cuda": 100_000})
    parts = setting.llm, setting.distiller, setting.formatter, tasks
    figures = [evaluate.evaluate_one(args, *parts, "emo", seed, method) for seed in (13, 21)]
    assert torch.equal(*scores) == (method == "zero_shot")
    assert method != "zero_shot" or figures[0] == figures[1]


KEYS = {"method", "llm", "checkpoint", "split", "tasks", "data_hash", "task", "seed", "k", "distill_len",
        "template", "retrieval", "perturbation", "n", "macro_f1", "accuracy", "headline", "commit",
        "swapped_with", "n_predicted", "demo_tokens"}


def test_one_line_for_each_method_task_and_seed(argv, tmp_path, llama, tiny_tasks, capsys):
    final = evaluate.main(argv)
    records = read_lines(tmp_path / "results.jsonl")
    assert Counter((r["method"], r["task"], r["seed"]) for r in records) == Counter(
        (m, task, seed) for m in METHODS for task in ("ag_news", "emo") for seed in (13, 42))
    expected = {"llm": llama.name, "split": "class_to_class", "tasks": "metaicl", "k": 4, "template": "space",
                "n": 8, "distill_len": 4}  # l is the checkpoint's
    for r in records:
        assert r.keys() >= KEYS and r.items() >= expected.items()
        assert r["data_hash"] == tiny_tasks.data_hash(r["task"], r["seed"])
        assert (r["checkpoint"] is not None) == (r["method"] == "mend")
        assert r["headline"] == r["macro_f1"]  # both tasks are classification tasks
    out = capsys.readouterr().out
    assert json.loads(out.splitlines()[-1]) == final
    assert final["tasks"] == 2 and final["split"] == "class_to_class"
    for method in METHODS:  # mean and standard deviation over seeds of the mean over tasks
        by_seed = [np.mean([100 * r["headline"] for r in records if (r["method"], r["seed"]) == (method, s)])
                   for s in (13, 42)]
        assert final["headline"][method] == pytest.approx(
            {"mean": np.mean(by_seed), "std": np.std(by_seed, ddof=1)}, abs=0.00501)
    accuracy = np.mean([100 * r["accuracy"] for r in records if r["method"] == "icl"])
    assert final["accuracy"]["icl"]["mean"] == pytest.approx(accuracy, abs=0.00501)
    assert "2 of 20 tasks" in out and f"{final['headline']['icl']['mean']:.2f} ±" in out


def vectors_of(distiller, tokenizer, files: dict) -> torch.Tensor:
    """What `distiller` makes of four demonstrations."""
    ids = Formatter(tokenizer, "space", 900).demonstrations(files["train"][:4], 900)
    return distiller(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool))


def test_the_checkpoints_vectors_are_used(scored, checkpoint, llama_llm, tokenizer, tiny_tasks, monkeypatch):
    seen = []
    monkeypatch.setattr(score, "vector_prefix", lambda llm, vectors, bos: seen.append(vectors) or demo_prefix(
        llm, torch.tensor([[1]]), torch.ones(1, 1, dtype=torch.bool)))
    scored("--methods", "mend", *ONE)
    saved, other = loading.load_checkpoint(checkpoint)[0], make_distiller(llama_llm, seed=77)
    other.load_state_dict({k.removeprefix("distiller."): t for k, t in saved.items()})
    expected = vectors_of(other, tokenizer, tiny_tasks.files("emo", 13))
    assert len(seen) == 1 and torch.allclose(seen[0], expected, atol=1e-6)


UNSEEN = {"tasks": "metaicl", "split": "class_to_class"}


def calls_of_evaluate_one(monkeypatch) -> list[tuple]:
    """(task, seed, method) of everything that is scored from now on."""
    evaluate_one, calls = evaluate.evaluate_one, []
    monkeypatch.setattr(evaluate, "evaluate_one", lambda *a: calls.append(a[5:8]) or evaluate_one(*a))
    return calls


def test_a_run_that_was_killed_goes_on_where_it_was(argv, tmp_path, monkeypatch):
    out, whole = tmp_path / "results.jsonl", tmp_path / "whole.jsonl"
    evaluate.main([*argv, "--out", str(whole)])
    text = whole.read_text()
    last = text.splitlines()[-1]
    out.write_text(text[:len(text) - len(last) // 2])
    calls, last = calls_of_evaluate_one(monkeypatch), json.loads(last)
    final = evaluate.main(argv)
    assert calls == [(last["task"], last["seed"], last["method"])]
    assert read_lines(out) == read_lines(whole) and len(read_lines(out)) == 20
    calls.clear()
    assert evaluate.main(argv) == final and calls == [] and read_lines(out) == read_lines(whole)


@pytest.mark.parametrize("flag, value", [("--k", "3"), ("--limit", "5"), ("--template", "newline"),
                                         ("--context-len", "100")])
def test_other_settings_are_not_taken_from_the_results_file(scored, flag, value):
    scored("--methods", "icl", *ONE)
    first, second = scored("--methods", "icl", *ONE, flag, value)
    name = flag[2:].replace("-", "_")
    assert str(second[name]) == value != str(first[name])


def test_another_checkpoint_is_not_taken_from_the_results_file(scored, tmp_path, llama_llm):
    scored("--methods", "icl", "mend", *ONE)
    other = write_run(tmp_path / "finetune-tiny", llama_llm, seed=5)  # the same folder name, other weights
    methods = Counter(r["method"] for r in scored("--methods", "icl", "mend", *ONE, "--checkpoint",
                                                  str(other)))
    assert methods == {"icl": 1, "mend": 2}  # the checkpoint has no part in icl


def test_default_results_file_is_named_after_the_split(argv):
    final = evaluate.main([*argv, "--methods", "zero_shot", *ONE, "--out", ""])
    out = Path(final["out"])
    assert out == common.OUT / "eval-class_to_class.jsonl" and len(read_lines(out)) == 1


@pytest.mark.parametrize("seed", range(5))
def test_summary_against_a_count_by_hand(seed):
    rng = random.Random(seed)
    methods, tasks, seeds = ["icl", "mend"], ["a", "b", "c"], [13, 21, 42][:rng.randint(1, 3)]
    records = [{"method": m, "task": t, "seed": s, "headline": rng.random()} for m in methods for t in tasks
               for s in seeds]
    rng.shuffle(records)
    values = defaultdict(dict)
    for r in records:
        values[r["method"]][r["task"], r["seed"]] = 100 * r["headline"]

    def spread(v):
        return np.std(v, ddof=1) if len(v) > 1 else 0.0
    table = paper.summary.summarise(records, methods)
    assert list(table) == [*tasks, "average"]
    for m in methods:
        for t in tasks:
            over_seeds = [values[m][t, s] for s in seeds]
            assert table[t][m] == pytest.approx((np.mean(over_seeds), spread(over_seeds)))
        averages = [np.mean([values[m][t, s] for t in tasks]) for s in seeds]
        assert table["average"][m] == pytest.approx((np.mean(averages), spread(averages)))


def test_the_summary_has_accuracy_recovered_gain_and_a_star_for_a_single_label(capsys):
    figures = {"zero_shot": (0.2, 0.3, 2), "icl": (0.6, 0.5, 2), "mend": (0.3, 0.4, 1),
               "majority": (0.1, 0.9, 3)}
    records = [{"method": m, "task": "emo", "seed": 13, "headline": f1, "accuracy": acc, "n": 9,
                "n_predicted": n} for m, (f1, acc, n) in figures.items()]
    del records[-1]["n_predicted"]  # of a line that is older than it
    records.append(records[1] | {"task": "trec"})
    for seeds, emo, trec in ((1, "emo 20.00 60.00 30.00* 10.00", "trec – 60.00 – –"),
                             (2, "emo 20.00 ± 0.00 60.00 ± 0.00 30.00 ± 0.00* 10.00 ± 0.00",
                              "trec – 60.00 ± 0.00 – –")):
        paper.summary.print_summary([r | {"seed": s} for r in records for s in range(seeds)], list(figures))
        rows = {line.split("  ")[0]: line.split() for line in capsys.readouterr().out.splitlines()}
        assert (" ".join(rows["emo"]), " ".join(rows["trec"])) == (emo, trec)
    assert rows["accuracy"][1::3] == ["30.00", "50.00", "40.00", "90.00"]
    assert rows["recovered gain"][2:] == ["0%", "100%", "25%", "-25%"]


# Controls

@pytest.fixture
def three_tasks(tasks_dir, tmp_path) -> Path:
    """tasks_dir with a third meta-test task, of other examples than the two."""
    folder = tmp_path / "three"
    shutil.copytree(tasks_dir, folder)
    (folder / "poem_sentiment").mkdir()
    for seed, source in zip(SEEDS, SEEDS[1:] + SEEDS[:1], strict=True):
        for part in ("train", "dev", "test"):
            shutil.copy(folder / "emo" / f"emo_16_{source}_{part}.jsonl",
                        folder / "poem_sentiment" / f"poem_sentiment_16_{seed}_{part}.jsonl")
    return folder


def collection(test: list[str]) -> Tasks:
    return Tasks(Path(), "metaicl", "class_to_class", [], test, [], [], {})


def test_partners_are_a_derangement_of_the_evaluated_tasks():
    for n in range(2, 9):
        names = [f"t{i}" for i in range(n)]
        tasks = collection([*names, "not evaluated"])
        swapped = [partners("mend_swapped", t, names[::-1], tasks) for t in names]
        assert swapped == [partners("icl_swapped", t, names[::-1], tasks) for t in names]
        assert sorted(swapped) == [[t] for t in names]
        assert all(t not in others for t, others in zip(names, swapped, strict=True))
        for t in names:
            assert partners("mend_constant", t, names, tasks) == [n for n in names if n != t]
            assert not any(partners(m, t, names, tasks) for m in ("mend", "mend_permuted", "icl"))
    tasks = collection(["a", "b", "c"])  # of a single task: all of the split
    assert partners("mend_swapped", "c", ["c"], tasks) == ["a"]
    assert partners("mend_constant", "b", ["b"], tasks) == ["a", "c"]
    with pytest.raises(UserError, match="another meta-test task's demonstrations; a is alone"):
        partners("mend_swapped", "a", ["a"], collection(["a"]))


def test_controls_read_vectors_of_other_tasks(scored, three_tasks, llama_llm, tokenizer, monkeypatch):
    seen, prefix = [], model.vector_prefix
    monkeypatch.setattr(score, "vector_prefix", lambda llm, vectors, bos: (
        seen.append(vectors), prefix(llm, vectors, bos))[1])
    monkeypatch.setattr(evaluate, "vector_prefix", score.vector_prefix)
    records = scored("--tasks", str(three_tasks), "--methods", "mend_swapped", "mend_constant", "mend",
                     "--seeds", "13")
    tasks, distiller = load_tasks(str(three_tasks), "class_to_class"), make_distiller(llama_llm)
    own = {task: vectors_of(distiller, tokenizer, tasks.files(task, 13)) for task in tasks.test}
    assert len(seen) == len(records) == 9
    partner = dict(zip(tasks.test, tasks.test[1:] + tasks.test[:1], strict=True))
    for vectors, r in zip(seen, records, strict=True):
        others = {"mend": [], "mend_swapped": [partner[r["task"]]],
                  "mend_constant": [t for t in tasks.test if t != r["task"]]}[r["method"]]
        expected = sum(own[t] for t in others or [r["task"]]) / (len(others) or 1)
        assert torch.allclose(vectors, expected, atol=1e-5) and r["checkpoint"] is not None
        assert r["swapped_with"] == (" ".join(f"{t}@{tasks.data_hash(t, 13)}" for t in others) or None)
    assert min((a - b).abs().max() for a in own.values() for b in own.values() if a is not b) > 1e-3


def test_vectors_of_others_are_made_once_and_kept_for_one_seed(scored, three_tasks, monkeypatch):
    made, make = [], evaluate.task_vectors
    monkeypatch.setattr(evaluate, "task_vectors", lambda t, seed, *given: (
        made.append((t, seed)), make(t, seed, *given))[1])
    scored("--tasks", str(three_tasks), "--methods", "mend_swapped", "mend_constant", "--seeds", "13", "21")
    assert len(made) == len({*made}) == 6
    assert [seed for _, seed in made] == [13, 13, 13, 21, 21, 21]  # at no time are those of two seeds needed


def test_icl_swapped_reads_what_stands_behind_mend_swapped(scored, three_tasks, monkeypatch):
    seen, prefix = [], score.demo_prefix
    monkeypatch.setattr(score, "demo_prefix", lambda llm, ids, mask, head: (
        seen.append(ids), prefix(llm, ids, mask, head))[1])
    records = scored("--tasks", str(three_tasks), "--seeds", "13",
                     "--methods", "icl", "icl_swapped", "mend_swapped")
    lines = {(r["method"], r["task"]): r for r in records}
    read = dict(zip([key for key in lines if key[0] != "mend_swapped"], seen, strict=True))
    tasks = load_tasks(str(three_tasks), "class_to_class")
    for task, other in zip(tasks.test, tasks.test[1:] + tasks.test[:1], strict=True):
        assert torch.equal(read["icl_swapped", task], read["icl", other])
        assert not torch.equal(read["icl_swapped", task], read["icl", task])
        line = lines["icl_swapped", task]
        assert line["swapped_with"] == lines["mend_swapped", task]["swapped_with"] is not None
        assert line["checkpoint"] is None and line["demo_tokens"] == lines["icl", other]["demo_tokens"]


def test_a_control_of_other_tasks_is_not_taken_from_the_results_file(scored, three_tasks):
    flags = ["--tasks", str(three_tasks), "--methods", "mend", "mend_constant", "--seeds", "13", "--only",
             "emo"]
    scored(*flags, "ag_news")
    found = Counter((r["method"], r["task"]) for r in scored(*flags, "poem_sentiment"))
    assert found["mend", "emo"] == 1 and found["mend_constant", "emo"] == 2


def test_permuted_labels_are_wrong_alike(argv, tokenizer, three_tasks, monkeypatch, capsys):
    _, by_distiller = read_by(monkeypatch)
    load = sources.tasks.load_tasks

    def with_a_choice(*a):
        tasks = load(*a)
        tasks.types = tasks.types | {"ag_news": "multi-choice"}
        return tasks
    monkeypatch.setattr(sources.tasks, "load_tasks", with_a_choice)
    argv = [*argv, "--tasks", str(three_tasks), "--methods", "mend_permuted", "--seeds", "13"]
    evaluate.main(argv)
    following, expected = {"happy": "sad", "sad": "strange", "strange": "happy"}, []
    for task in ("emo", "poem_sentiment"):
        demos = load(str(three_tasks), "class_to_class").files(task, 13)["train"][:4]
        demos = [d | {"output": following[d["output"]]} for d in demos]
        expected.append(assembled(tokenizer, "space", demos))
    assert by_distiller == expected
    assert "note: mend_permuted leaves out what is no classification: ag_news\n" in capsys.readouterr().out
    with pytest.raises(UserError, match="mend_permuted needs a classification task"):
        evaluate.main([*argv, "--only", "ag_news"])


# Retrieved and perturbed demonstrations, vectors of other methods

def read_by(monkeypatch) -> tuple[list[list[int]], list[list[int]]]:
    """The demonstration tokens, row by row, that the LLM and the distiller are given from now on."""
    by_llm, by_distiller, prefix, load = [], [], model.demo_prefix, loading.load_distiller

    def record(seen, ids, mask):
        seen += [row[m].tolist() for row, m in zip(ids, mask, strict=True)]

    def load_and_watch(path, llm):
        distiller, state = load(path, llm)
        distiller.register_forward_pre_hook(lambda module, batch: record(by_distiller, *batch[:2]))
        return distiller, state
    for reader in (score, paper.demos):
        monkeypatch.setattr(reader, "demo_prefix", lambda llm, ids, mask, bos: (
            record(by_llm, ids, mask), prefix(llm, ids, mask, bos))[1])
    monkeypatch.setattr(loading, "load_distiller", load_and_watch)
    return by_llm, by_distiller


def assembled(tokenizer: Tokenizer, template: str, demos: list[dict]) -> list[int]:
    """[x_1 y_1 x_2 y_2 ...] by the template, from the parts that each demonstration still has."""
    before_answer, between = TEMPLATES[template]
    ids, separator = [], ""
    for e in demos:
        ids += tokenizer.reference(separator + (e["input"] or e["output"]))
        ids += tokenizer.reference(before_answer + e["output"]) if e["input"] and e["output"] else []
        separator = between
    return ids


@pytest.mark.parametrize("kind", PERTURBATIONS)
@pytest.mark.parametrize("template", ["space", "newline"])
def test_both_read_the_same_perturbed_demonstrations(scored, tokenizer, tiny_tasks, monkeypatch,
                                                                  kind, template):
    by_llm, by_distiller = read_by(monkeypatch)
    records = scored("--methods", "icl", "mend", "icl_budget", "--perturb", kind, "--template", template,
                     "--only", "emo")
    expected = []
    for seed in (13, 42):
        clean = tiny_tasks.files("emo", seed)["train"][:4]
        spoiled = perturb(clean, kind, seed)
        golds, shown = ({e["input"]: e["output"] for e in examples} for examples in (clean, spoiled))
        assert {"no_label": set(shown.values()) == {""}, "random_label": shown.keys() == golds.keys(),
                "no_input": [e["output"] for e in spoiled] == [e["output"] for e in clean],
                "wrong_label": all(shown[x] != golds.get(x) for x in shown)}[kind]
        expected.append(assembled(tokenizer, template, spoiled))
    assert by_distiller == expected and by_llm[::2] == expected  # by_llm: icl and icl_budget in turn
    for ids in by_llm[1::2]:  # at most l = 4 tokens: where an example is cut, its label is the perturbed one
        assert len(ids) <= 4
    assert {(r["perturbation"], r["retrieval"], r["template"]) for r in records} == {(kind, None, template)}


def test_a_cut_example_keeps_its_perturbed_label(scored, tokenizer, tiny_tasks, monkeypatch):
    by_llm, _ = read_by(monkeypatch)
    scored("--methods", "icl_budget", "--perturb", "wrong_label", "--only", "emo")
    formatter = Formatter(tokenizer, "space", 900)
    for seed, ids in zip((13, 42), by_llm, strict=True):
        clean = tiny_tasks.files("emo", seed)["train"][:4]
        spoiled = perturb(clean, "wrong_label", seed)
        shortest = min(range(4), key=lambda i: len(formatter.demonstration(spoiled[i], True)))  # noqa: B023
        wrong = formatter.answer(spoiled[shortest]["output"])
        assert wrong != formatter.answer(clean[shortest]["output"]) and ids[-len(wrong):] == wrong[:4]


def test_tasks_without_options_are_left_out_where_labels_are_changed(argv, own_tasks, tmp_path, capsys):
    path = own_tasks / "emo" / "emo_16_42_train.jsonl"  # of one seed only: then the task is left out for all
    write_lines(path, [e | {"options": []} for e in read_lines(path)])
    argv = [*argv, "--tasks", str(own_tasks), "--methods", "icl", "--perturb"]
    for kind in ("random_label", "wrong_label"):
        assert evaluate.main([*argv, kind])["tasks"] == 1
        told = f"note: --perturb {kind} means nothing without at least two options; left out: emo\n"
        assert told in capsys.readouterr().out
    assert {r["task"] for r in read_lines(tmp_path / "results.jsonl")} == {"ag_news"}
    assert evaluate.main([*argv, "no_label"])["tasks"] == 2
    with pytest.raises(UserError, match="no task has options in its demonstrations"):
        evaluate.main([*argv, "wrong_label", "--only", "emo"])


@pytest.mark.parametrize("method", ["icl", "mend"])
def test_each_query_is_read_behind_its_neighbours(scored, own_tasks, tokenizer, monkeypatch, method):
    by_llm, by_distiller = read_by(monkeypatch)
    # among other seeds' training examples are this seed's test questions
    shutil.copy(own_tasks / "emo" / "emo_16_13_test.jsonl", own_tasks / "emo" / "emo_16_42_train.jsonl")
    record, = scored("--tasks", str(own_tasks), "--methods", method, "--retrieve", "bm25", *ONE)
    tasks = load_tasks(str(own_tasks), "class_to_class")
    pool, queries = tasks.retrieval_pool("emo", 13), tasks.files("emo", 13)["test"][:8]
    rows = bm25_neighbours([e["input"] for e in pool], [q["input"] for q in queries], 4)
    expected = [assembled(tokenizer, "space", [pool[i] for i in row]) for row in rows]
    assert sorted(by_llm if method == "icl" else by_distiller) == sorted(expected)
    assert len(set(map(tuple, expected))) == 8
    assert (record["retrieval"], record["perturbation"]) == ("bm25", None)
    assert record["data_hash"] == tasks.data_hash("emo", 13, retrieval=True) != tasks.data_hash("emo", 13)


def test_dense_retrieval_takes_the_llm_or_a_named_encoder(scored, gpt2, monkeypatch):
    flags, (by_llm, _) = ["--methods", "icl", "--retrieve", "dense", *ONE], read_by(monkeypatch)
    scored(*flags)
    records = scored(*flags, "--dense-model", str(gpt2))
    assert [r["retrieval"] for r in records] == ["dense", f"dense:{gpt2.name}@{llm_hash(str(gpt2))[:6]}"]
    assert len(by_llm) == 16 and sorted(by_llm[:8]) != sorted(by_llm[8:])


def test_what_needs_no_demonstrations_is_scored_once(scored, own_tasks, tmp_path, llama_llm, monkeypatch):
    shutil.copy(own_tasks / "emo" / "emo_16_13_test.jsonl", own_tasks / "emo" / "emo_16_42_test.jsonl")
    calls = calls_of_evaluate_one(monkeypatch)
    free = write_run(tmp_path / "free", llama_llm, "free", finetune=UNSEEN | {"lam": 0.0})
    records = scored("--tasks", str(own_tasks), "--methods", "zero_shot", "icl", "prompt_tuning",
                     "--checkpoint", str(free))
    for method in ("zero_shot", "prompt_tuning"):
        # the test questions of ag_news differ from seed to seed, so there each seed is scored
        found = sorted(c[:2] for c in calls if c[2] == method)
        assert found == [("ag_news", 13), ("ag_news", 42), ("emo", 13)]
        both = [{k: v for k, v in r.items() if k not in ("seed", "data_hash")}
                for r in records if (r["method"], r["task"]) == (method, "emo")]
        assert len(both) == 2 and both[0] == both[1]
    assert sum(c[2] == "icl" for c in calls) == 4 and len(records) == 12


def test_records_carry_what_a_checkpoint_was_trained_on(scored, tmp_path, llama_llm):
    stages = {"pretrain": {"objective": "kl", "beta": 0.8}, "finetune": UNSEEN | {"lam": 0.1}}
    run = write_run(tmp_path / "run", llama_llm, **stages)
    records = scored("--checkpoint", str(run), "--methods", "icl", "mend", "majority", *ONE)
    assert {r["method"]: r["trained_on"] for r in records} == {"icl": None, "majority": None, "mend": stages}


@pytest.mark.parametrize("change, message", [
    (["--methods", "icl", "mend", "hypertuning"], "--methods mend hypertuning take a checkpoint each"),
    (["--methods", "icl", "--retrieve", "bm25", "--perturb", "no_label"],
     "--retrieve and --perturb exclude each other"),
    (["--retrieve", "bm25"], "zero_shot has no part in --retrieve and --perturb; leave it out of --methods"),
    (["--methods", "majority", "prompt_tuning", "--perturb", "no_input"],
     "majority prompt_tuning has no part in"),
    (["--methods", "mend_swapped", "hypertuning"], "--methods mend hypertuning take a checkpoint each"),
    (["--methods", "mend", "mend_constant", "--perturb", "no_input"], "mend_constant has no part in"),
    (["--methods", "mend_permuted", "--retrieve", "bm25"], "mend_permuted has no part in"),
    (["--dense-model", "x"], "--dense-model needs --retrieve dense"),
    (["--methods", "icl", "--retrieve", "dense", "--dense-model", "some/name"],
     "--dense-model some/name would come from"),
    (["--methods", "icl", "--retrieve", "bm25", "--k", "200"],
     "80 examples to retrieve from, and --k is 200"),
    (["--seeds", "13", "7"], "--seeds 7 is unknown"),
    (["--out", f"{__file__}/x"],
     "--out .* stands under a file"), (["--only", "agnews"], "--only agnews is no meta-test task.*ag_news"),
    (["--k", "17"], "has 16 training examples for seed 13, and --k is 17"),
                                             (["--limit", "-1"], "--limit is -1"),
    (["--context-len", "0"], "--context-len is 0"), (["--checkpoint", "/nowhere"],
                                                     "no checkpoint at /nowhere"),
    (["--methods", "prompt_tuning"], "holds a distiller that was trained with L_distill"),
    (["--context-len", "3"], "not one of 4 demonstrations fits into 3 tokens")])
def test_user_errors(argv, change, message):
    with pytest.raises(UserError, match=message):
        evaluate.main([*argv, *change])


def test_what_is_named_twice_counts_once(argv):
    argv = [*argv, "--methods", "icl", "--seeds", "13", "--only"]
    assert evaluate.main([*argv, "ag_news", "emo"]) == evaluate.main([*argv, "emo", "emo", "emo", "ag_news"])


def test_mend_needs_a_checkpoint(argv):
    at = argv.index("--checkpoint")
    with pytest.raises(UserError, match="--methods mend needs --checkpoint DIR"):
        evaluate.main([*argv[:at], *argv[at + 2:]])


def test_a_checkpoint_of_another_llm(argv, gpt2):
    with pytest.raises(UserError, match="was trained for the LLM .*tiny-llama.*tiny-gpt2"):
        evaluate.main([*argv, "--llm", str(gpt2)])


def test_flag_faults_come_together(argv):
    with pytest.raises(UserError) as error:
        evaluate.main([*argv, "--seeds", "7", "--limit", "-1", "--k", "0", "--split", "x"])
    assert all(part in str(error.value) for part in ("--seeds 7", "--limit is -1", "--k is 0", "--split x"))


def test_a_file_that_is_no_results_file(argv, tmp_path):
    (tmp_path / "results.jsonl").write_text("no json\n")
    with pytest.raises(UserError, match="is not a results file"):
        evaluate.main(argv)


def test_examples_without_options_cannot_be_scored(argv, own_tasks):
    path = own_tasks / "emo" / "emo_16_13_test.jsonl"
    write_lines(path, [e | {"options": []} for e in read_lines(path)])
    with pytest.raises(UserError, match="task emo: .* it has no options"):
        evaluate.main([*argv, "--tasks", str(own_tasks)])


def test_functions_are_evaluated_by_accuracy(argv, tmp_path, tasks_dir):
    """A folder that holds one function: no meta-training task is needed, and the headline is accuracy."""
    task, folder = "list_functions-c001", tmp_path / "functions"
    (folder / task).mkdir(parents=True)
    for path in (tasks_dir / "emo").glob("emo_16_*.jsonl"):
        (folder / task / path.name.replace("emo", task)).write_text(path.read_text())
    final = evaluate.main([*argv, "--tasks", str(folder), "--split", "functions",
                           "--methods", "zero_shot", "icl", "--seeds", "13"])
    assert (final["split"], final["tasks"]) == ("functions", 1)
    records = read_lines(Path(final["out"]))
    assert all(r["headline"] == r["accuracy"] and r["tasks"] == "bigbench" for r in records)


def test_demo_tokens_are_those_of_the_demonstrations_that_a_method_reads(scored):
    lines = scored("--methods", "mend", "mend_swapped", "mend_constant", "--seeds", "13")
    tokens = {(r["method"], r["task"]): r["demo_tokens"] for r in lines}
    assert tokens["mend", "emo"] == tokens["mend_swapped", "ag_news"] != tokens["mend", "ag_news"]
    assert tokens["mend", "ag_news"] == tokens["mend_swapped", "emo"]
    assert tokens["mend_constant", "emo"] is tokens["mend_constant", "ag_news"] is None


def test_ranks_share_the_plan_out_and_write_what_one_process_would(argv, tmp_path, monkeypatch):
    """Two ranks as threads, whose `gather` waits for both."""
    whole, out = tmp_path / "whole.jsonl", tmp_path / "shared.jsonl"
    evaluate.main([*argv, "--out", str(whole)])
    args = common.parse(evaluate.get_parser(), [*argv, "--out", str(out)], evaluate.PRESETS)
    args.device, tasks = "cpu", sources.tasks.tasks_of(args)
    llm, distiller, state, formatter = loading.load_all(args, CPU)
    calls, rank, barrier, parts = [], threading.local(), threading.Barrier(2, timeout=60), [[], []]
    evaluate_one = evaluate.evaluate_one

    def gather(records):
        parts[rank.number] = records
        barrier.wait()
        found = [*parts[0], *parts[1]]
        barrier.wait()
        return found

    def scored_by(*a):
        calls.append((rank.number, *a[5:8]))
        return evaluate_one(*a)

    def one(number):
        rank.number = number
        return evaluate.evaluate(args, llm, distiller, state["trained_on"], formatter, tasks, out)
    monkeypatch.setattr(evaluate, "evaluate_one", scored_by)
    monkeypatch.setattr(evaluate, "gather", gather)
    monkeypatch.setattr(evaluate, "shares", lambda llm: (rank.number, 2))
    monkeypatch.setattr(evaluate, "is_main", lambda: rank.number == 0)
    monkeypatch.setattr(evaluate, "Stop", lambda minutes: SimpleNamespace(
        asked=lambda: 0, listen=lambda: None))
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(one, (0, 1))
    assert first == second == read_lines(out)
    assert [r | {"date": 0} for r in first] == [r | {"date": 0} for r in read_lines(whole)]  # midnight
    made = Counter(number for number, *_ in calls)
    assert len({call[1:] for call in calls}) == len(calls) == 20 and min(made.values()) > 5


def test_a_checkpoint_is_read_by_the_template_it_was_trained_with(argv, tmp_path, llama_llm, capsys):
    distiller = make_distiller(llama_llm)
    about = model_of(distiller, llama_llm) | {"template": "newline"}
    run.save_checkpoint(tmp_path / "run" / "best.safetensors", distiller, {"model": about, "trained_on": {}})
    argv = [*argv, *ONE, "--checkpoint", str(tmp_path / "run"), "--methods", "icl", "mend"]
    evaluate.main(argv)
    assert {r["template"] for r in read_lines(tmp_path / "results.jsonl")} == {"newline"}
    evaluate.main([*argv, "--template", "space"])
    assert [r["template"] for r in read_lines(tmp_path / "results.jsonl")] == ["newline"] * 2 + ["space"] * 2
    assert "note: trained on --template newline, evaluated on space" in capsys.readouterr().out


def test_all_tasks_that_cannot_be_scored_are_named_before_the_llm_is_loaded(argv, own_tasks, monkeypatch):
    monkeypatch.setattr(evaluate, "load_all", lambda *_: pytest.fail("the LLM was loaded first"))
    for task in ("emo", "ag_news"):
        write_lines(own_tasks / task / f"{task}_16_13_test.jsonl", [
            {"task": task, "input": "x", "output": "free", "options": []}])
    argv = [*argv, "--tasks", str(own_tasks)]
    with pytest.raises(UserError, match="task ag_news: .* has no options.*task emo: .* has no options"):
        evaluate.main(argv)
    shutil.copy(own_tasks / "emo" / "emo_16_42_test.jsonl", own_tasks / "emo" / "emo_16_13_test.jsonl")
    with pytest.raises(UserError, match="ag_news.*; or name the other tasks with --only or --test-tasks"):
        evaluate.main(argv)


def test_only_what_is_asked_has_to_be_scorable(argv, own_tasks, tmp_path, capsys):
    """Queries beyond --limit, and tasks that --perturb leaves out, may be without options."""
    for task, change in (("emo", slice(20, None)), ("ag_news", slice(0, 0))):
        path = own_tasks / task / f"{task}_16_13_test.jsonl"
        lines = read_lines(path)
        for line in lines[change]:
            line["options"] = []
        write_lines(path, lines)
    argv = [*argv, "--tasks", str(own_tasks), "--seeds", "13", "--methods", "icl"]
    evaluate.main([*argv, "--limit", "4"])
    with pytest.raises(UserError, match="task emo: .* has no options"):
        evaluate.main([*argv, "--limit", "0"])
    for part in ("train", "test"):
        path = own_tasks / "emo" / f"emo_16_13_{part}.jsonl"
        write_lines(path, [line | {"options": []} for line in read_lines(path)])
    evaluate.main([*argv, "--limit", "4", "--perturb", "wrong_label"])
    assert "left out: emo" in capsys.readouterr().out


def test_a_task_without_queries_is_refused(argv, own_tasks):
    (own_tasks / "emo" / "emo_16_13_test.jsonl").write_text("")
    with pytest.raises(UserError, match="emo.*(no queries|is empty)"):
        evaluate.main([*argv, "--tasks", str(own_tasks)])
    with pytest.raises(UserError, match="has no queries for seed 13; give another --k"):
        evaluate.main([*argv, "--tasks", "recall", "--k", "1", "--methods", "icl"])
