"""Tests of tables.py: means, spreads and intervals against hand-worked numbers and plain loops, and the
paper's figures."""

import json
import random
import statistics

import numpy as np
import pytest
import scipy.stats
from conftest import write_lines

import common
import evaluate
import paper.summary
from common import UserError
from evaluate import METHODS
from paper import tables
from paper.summary import read_results
from paper.tables import block, group, marked, paired_interval, summary, table_lines, variant_of

PAPER = json.loads((common.ROOT / "results" / "paper.json").read_text())["tables"]


def record(**changes) -> dict:
    """A line as evaluate.py writes it."""
    return {"method": "icl", "checkpoint": None, "task": "emo", "seed": 13, "data_hash": "0", "llm": "tiny",
            "k": 16, "split": "class_to_class", "tasks": "metaicl", "distill_len": 4, "context_len": 900,
            "template": "space", "retrieval": None, "perturbation": None, "limit": 0, "dtype": "fp32",
            "n": 10, "macro_f1": 0.5, "accuracy": 0.5, "headline": 0.5, "trained_on": None, "commit": "abc",
            "date": "2026-01-01"} | changes


def mend(pretrain: dict | None, finetune: dict | None, **changes) -> dict:
    stages = {k: v for k, v in (("pretrain", pretrain), ("finetune", finetune)) if v}
    return record(method="mend", checkpoint="run@1", trained_on=stages) | changes


KL, FULL = {"objective": "kl"}, {"lam": 1.0, "pred_weight": 1.0}


def cells(lines: list[str]) -> dict[tuple[str, str], list[str]]:
    """(LLM, row): its cells, of a table in Markdown."""
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|") and "---" not in line]
    return {(llm, row): rest for llm, row, *rest in rows}


def test_summary_by_hand():
    scores = {("a", 1): (50.0, 10), ("a", 2): (60.0, 10), ("b", 1): (30.0, 4), ("b", 2): (20.0, 4),
              ("c", 1): (99.0, 7)}
    # over tasks a and b: 40 and 40; c has no seed 2
    assert summary(scores) == {"mean": 40.0, "std": 0.0, "tasks": 2, "seeds": 2, "queries": 14}
    scores["b", 2] = (26.0, 4)  # 40 and 43: mean 41.5, sample std 3 / sqrt(2)
    assert summary(scores) == pytest.approx({"mean": 41.5, "std": 3 / 2 ** 0.5, "tasks": 2, "seeds": 2,
                                             "queries": 14})
    with pytest.raises(UserError, match=r"none of a, b has a result for each of the seeds \[1, 2\]"):
        summary({("a", 1): (1.0, 1), ("b", 2): (1.0, 1)})


@pytest.mark.parametrize("seed", range(5))
def test_summary_against_plain_loops(seed):
    rng = random.Random(seed)
    tasks, seeds = "abcd"[:rng.randint(1, 4)], [1, 2, 3][:rng.randint(1, 3)]
    scores = {(t, s): (100 * rng.random(), 5) for t in tasks for s in seeds}
    means = [statistics.mean(scores[t, s][0] for t in tasks) for s in seeds]
    std = statistics.stdev(means) if len(seeds) > 1 else 0
    found = summary(dict(rng.sample(sorted(scores.items()), len(scores))))
    assert (found["mean"], found["std"]) == pytest.approx((statistics.mean(means), std))


def test_recovered_gain_by_hand():
    def scores(**by_task):
        return {(task, seed): (value, 1) for task, values in by_task.items()
                for seed, value in enumerate(values)}
    zero = scores(a=(10, 10), b=(50, 50), c=(20, 20), d=(0, 0))
    icl = scores(a=(30, 20), b=(60, 30), c=(50, 40), e=(9, 9))
    ours = scores(a=(20, 20), b=(99, 99), c=(30, 20), d=(70, 70))
    # icl gains on a (25 of 10) and c (45 of 20), not on b (45 of 50): (22.5 - 15) / (35 - 15)
    gain = paper.summary.recovered_gain
    assert gain(ours, icl, zero) == pytest.approx({"gain": 0.375, "tasks": 2})
    assert gain(icl, icl, zero)["gain"] == 1 and gain(zero, icl, zero)["gain"] == 0
    assert gain(ours, scores(b=(1, 1)), zero) is None and gain(ours, {}, zero) is None
    headlines = {"zero_shot": (10, 20), "icl": (20, 10), "majority": (13, 99)}
    lines = [record(method=m, task=t, headline=h / 100) for m, values in headlines.items()
             for t, h in zip("ab", values, strict=True)]
    line, = [line for line in table_lines(lines, "2") if "recovered gain" in line]
    assert line.endswith("over the 1 tasks where icl is above zero_shot: majority 30%")


def test_a_table_says_where_one_label_was_the_only_answer():
    lines = table_lines([record(n_predicted=1), record(n_predicted=2, task="x"),
                         record(n_predicted=1, seed=21), record(method="majority")], "2")
    assert [line for line in lines if "one label" in line] == [
        "- tiny, class_to_class, icl: one label for all queries in 2 of 3 (task, seed): emo"]


def test_interval_by_hand():
    ours = {("a", 1): (51.0, 1), ("b", 1): (43.0, 1), ("only ours", 1): (0.0, 1)}
    base = {("b", 1): (40.0, 1), ("a", 1): (50.0, 1), ("only theirs", 1): (99.0, 1)}
    # gaps 1 and 3: mean 2, standard error sqrt(2) / sqrt(2) = 1, and t with one degree of freedom 12.706
    found = paired_interval(ours, base, [])
    assert found == pytest.approx({"gap": 2, "low": 2 - 12.706, "high": 2 + 12.706, "tasks": 2}, abs=1e-3)
    assert paired_interval(base, ours, [])["gap"] == -2
    assert paired_interval(ours, {("c", 1): (1.0, 1)}, []) is None
    assert paired_interval(ours, base, [["b", "x", "a"]]) == {
        "gap": 2, "low": -float("inf"), "high": float("inf"), "tasks": 2}


def gaps_to_scores(gaps: list[list[float]]) -> tuple[dict, dict]:
    """Scores of two methods on tasks 0, 1, ... whose gaps, seed by seed, are these."""
    ours = {(str(i), s): (gap, 1) for i, task in enumerate(gaps) for s, gap in enumerate(task)}
    return ours, dict.fromkeys(ours, (0.0, 1))


def test_interval_against_scipy_and_against_cluster_means():
    gaps = np.random.default_rng(0).normal(3, 5, size=(12, 4))
    expected = scipy.stats.ttest_1samp(gaps.mean(axis=1), 0).confidence_interval(0.95)
    found = paired_interval(*gaps_to_scores(gaps), [])
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))
    # clusters of equal size: the interval of their means
    expected = scipy.stats.ttest_1samp(gaps.reshape(4, 12).mean(axis=1), 0).confidence_interval(0.95)
    found = paired_interval(*gaps_to_scores(gaps), [[str(3 * i + j) for j in range(3)] for i in range(4)])
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("cluster, low, high", [(1, 0.94, 0.96), (3, 0.93, 0.97)])
def test_intervals_cover_what_they_say(cluster, low, high):
    """14 tasks with gaps of heavy tails (t4) and noise over two seeds; `cluster` of them are the same."""
    rng, runs = np.random.default_rng(1), 4000
    gaps = rng.standard_t(4, size=(runs, 14, 1))
    gaps[:, :cluster] = gaps[:, :1]
    noise = 0.5 * rng.normal(size=(runs, 14, 2))
    noise[:, :cluster] = noise[:, :1]
    clusters = [[str(i) for i in range(cluster)]]
    found = [paired_interval(*gaps_to_scores(g), clusters) for g in (gaps + noise).tolist()]
    assert low <= np.mean([f["low"] <= 0 <= f["high"] for f in found]) <= high


def test_clusters_are_of_known_tasks_and_do_not_overlap():
    for collection in json.loads((common.ROOT / "splits.json").read_text()).values():
        tasks = [task for cluster in collection["clusters"] for task in cluster]
        assert len(set(tasks)) == len(tasks) and set(tasks) <= collection["task_type"].keys()


def test_more_seeds_of_the_same_tasks_do_not_narrow_the_interval():
    gaps = [[-1.0], [4.0], [-4.0], [1.0]]
    one, many = (paired_interval(*gaps_to_scores([n * task for task in gaps]), []) for n in (1, 50))
    assert one == pytest.approx(many)


def test_the_latest_line_of_a_task_and_seed_counts_and_the_newest_checkpoint_of_a_cell():
    lines = [mend(KL, FULL, headline=0.1), mend(KL, FULL, task="ag_news", headline=0.2),
             mend(KL, FULL, headline=0.3), record(headline=0.9)]
    def scores():
        return {place: {(r["task"], r["seed"]): (100 * r["headline"], r["n"]) for r in cell}
                for place, cell in group(tables.belonging(lines, "2")[0], "2").items()}
    found = scores()
    assert found == {("tiny", "icl", "class_to_class"): {("emo", 13): (90.0, 10)},
                     ("tiny", "mend", "class_to_class"): {("emo", 13): (30.0, 10),
                                                          ("ag_news", 13): (20.0, 10)}}
    lines.append(mend(KL, FULL, headline=0.7, checkpoint="run@2"))  # trained anew; ag_news is of the old one
    assert scores()["tiny", "mend", "class_to_class"] == {("emo", 13): (70.0, 10)}


@pytest.mark.parametrize("change", [{"distill_len": 9}, {"dtype": "bf16"}, {"llm_weights": "8bit"},
                                    {"segments": 4}, {"retrieval": "dense:x"}, {"perturbation": "no_label"}])
def test_a_cell_holds_one_way_of_making_it(change):
    lines = [record(headline=0.1, task="ag_news") | change, record(headline=0.3),
             record(headline=0.5, task="ag_news", seed=21)]
    assert tables.latest(lines) == lines[1:]


def test_only_table_3_takes_changed_demonstrations():
    lines = [record(headline=0.8), record(perturbation="no_label", headline=0.1),
             record(retrieval="bm25", headline=0.2), record(retrieval="dense:mini", headline=0.3)]
    assert cells(table_lines(lines, "2"))["tiny", "icl"] == ["**80.00**"]
    table = table_lines(lines, "3")
    assert table[0] == "| LLM | row | none | bm25 | dense | no_label |"
    assert cells(table)["tiny", "icl"] == ["**80.00**", "**20.00**", "**30.00**", "**10.00**"]
    assert cells(table)["paper, gpt2-large", "icl"] == ["<u>41.30</u>", "<u>45.38</u>", "<u>48.33</u>",
                                                        "30.57"]


@pytest.mark.parametrize("pretrain, finetune, row", [
    (KL, FULL, "mend"), (None, FULL, "no_pretraining"), ({"objective": "clm"}, FULL, "clm"),
    ({"objective": "clm+kl"}, FULL, "clm+kl"), (KL, FULL | {"pred_weight": 0.0}, "without_pred"),
    (KL, FULL | {"lam": 0.0}, "without_distill"), (KL, FULL | {"pred_weight": 0.5}, None),
    ({"objective": "clm"}, FULL | {"lam": 0.0}, None), (None, FULL | {"lam": 0.0}, None), (KL, None, None)])
def test_the_row_that_table_4_gives_a_variant(pretrain, finetune, row):
    assert (variant_of(mend(pretrain, finetune)) in tables.TABLES["4"][2]) == (row is not None)
    assert row is None or variant_of(mend(pretrain, finetune)) == row
    hyper = mend({"objective": "clm"}, FULL | {"lam": 0.0}, method="hypertuning")  # no row of Table 4 either
    tuned = mend(None, FULL | {"lam": 0.0}, method="prompt_tuning")
    assert {variant_of(hyper), variant_of(tuned)} & {*tables.TABLES["4"][2]} == set()
    assert variant_of(record()) == "icl"


@pytest.mark.parametrize("change", [{"k": 4}, {"limit": 9}, {"template": "newline"}, {"context_len": 100},
                                    {"tasks": "bigbench"}])
def test_records_of_another_setting_than_the_newest_are_left_out(change):
    lines = table_lines([record(headline=0.1, **change), record(headline=0.2, seed=1, **change),
                         record(headline=0.8)], "2")
    assert cells(lines)["tiny", "icl"] == ["**80.00**"]
    assert [line for line in lines if line.startswith("- left out: 2 lines of another")]


def test_one_split_in_table_3_and_both_templates_in_table_7():
    assert any("left out: 1 lines" in line for line in table_lines([record(), record(split="hr_to_lr")], "3"))
    lines = [record(headline=0.5), record(headline=0.475, template="newline"), mend(KL, FULL, headline=0.4)]
    table = cells(table_lines(lines, "7"))
    assert table["LLM", "row"] == ["space", "newline", "difference"]
    assert table["tiny", "icl"] == ["**50.00**", "**47.50**", "-2.50"]
    assert table["tiny", "mend"] == ["<u>40.00</u>", "–", "–"]
    assert [table["paper, gpt2-large", m][2] for m in ("icl", "hypertuning",
                                                       "mend")] == ["-2.40", "-0.34", "0.15"]


def test_no_record_and_other_files():
    with pytest.raises(UserError, match="no line of the results belongs to table 4"):
        table_lines([record(method="majority")], "4")
    with pytest.raises(UserError,
                       match="the results lack checkpoint, .*--table 2 takes lines that evaluate.py wrote"):
        table_lines([{"step": 3, "kl": 0.5}], "2")
    with pytest.raises(UserError, match="--table 1 takes the last lines that data.py printed"):
        table_lines([record()], "1")


def test_table_1_of_a_setting_that_the_paper_has_not():
    part = {"tasks": 2, "of": 2, "avg_len": 1.5}
    assert table_lines([{"split": "own", "train": part, "test": part}], "1")[2] == (
        "| own | 2 of 2 | 1.50 | 2 of 2 | 1.50 | – |")


def test_best_is_bold_and_second_underlined_ties_alike():
    assert marked({"a": 1.0, "b": 3.0, "c": 2.0, "d": None, "e": 2.001, "f": 2.999}) == {
        "a": "{}", "b": "**{}**", "c": "<u>{}</u>", "d": "{}", "e": "<u>{}</u>", "f": "**{}**"}
    assert marked({"a": None}) == {"a": "{}"}


def test_block_prints_a_spread_only_where_there_is_one():
    lines = block("tiny", {"icl": {"x": (41.296, 2.149)}, "zero_shot": {"x": (34.36, 1e-14)},
                           "mend": {"x": None}}, ["x"])
    assert lines == ["| tiny | icl | **41.30** ±2.15 |", "| tiny | zero_shot | <u>34.36</u> |",
                     "| tiny | mend | – |"]


def test_table_2_whole():
    rng = random.Random(3)
    lines = [record(method=m, split=split, task=task, seed=seed, headline=rng.random(),
                    trained_on={} if m == "mend" else None) for m in ("icl", "mend")
             for split in ("class_to_class", "qa_to_qa") for task in ("x", "y") for seed in (13, 42)]
    rng.shuffle(lines)
    table = table_lines(lines, "2")
    assert table[0] == "| LLM | row | class_to_class | qa_to_qa | AVG |"
    means = {}
    for m in ("icl", "mend"):
        found = cells(table)["tiny", m]
        for split, text in zip(("class_to_class", "qa_to_qa"), found, strict=False):
            seeds = [np.mean([100 * r["headline"] for r in lines if (r["method"], r["split"], r["seed"])
                              == (m, split, s)]) for s in (13, 42)]
            means[m, split] = np.mean(seeds)
            assert text.strip("*<u>/").startswith(f"{np.mean(seeds):.2f}")
            assert text.endswith(f" ±{np.std(seeds, ddof=1):.2f}")
        assert found[2].strip("*<u>/") == f"{(means[m, 'class_to_class'] + means[m, 'qa_to_qa']) / 2:.2f}"
    text = "\n".join(table)
    assert "- tiny, class_to_class, icl, mend: 2 of 20 tasks, 20 queries, 2 seeds" in text
    assert "- tiny, qa_to_qa, icl, mend: 2 of 22 tasks, 20 queries, 2 seeds" in text
    gap = means["mend", "qa_to_qa"] - means["icl", "qa_to_qa"]
    assert f"- tiny, qa_to_qa, mend minus icl: {gap:+.2f} [" in text and "over 2 tasks" in text
    assert "k 16 · context_len 900" in text and "commit abc" in text


def test_a_row_without_all_columns_has_no_average():
    table = cells(table_lines([record(), record(split="qa_to_qa"), record(method="majority")], "2"))
    assert table["tiny", "icl"][2] == "**50.00**" and table["tiny", "majority"] == ["**50.00**", "–", "–"]


def test_each_llm_has_its_own_lines_and_notes():
    table = table_lines([record(llm="one", headline=0.1), record(llm="two", headline=0.9)], "6")
    assert cells(table)["one", "icl"] == ["**10.00**"] and cells(table)["two", "icl"] == ["**90.00**"]
    assert [line[:6] for line in table if "tasks, " in line and line.startswith("-")] == ["- one,", "- two,"]
    assert cells(table)["paper, opt-6.7b", "mend"] == ["**44.27** ±1.12"]


def test_paper_rows_are_those_of_the_paper():
    table = cells(table_lines([record(split=s) for s in common.SPLITS], "2"))
    for llm, rows in PAPER["2"].items():
        for row, known in rows.items():
            for text, split in zip(table[f"paper, {llm}", row], common.SPLITS, strict=False):
                mean, std = known[split]
                assert text.strip("*<u>/").split(" ")[0].strip("*<u>/") == f"{mean:.2f}"
                assert text.endswith(f" ±{std:.2f}") == (std > 0)
    assert table["paper, gpt2-large", "mend"][-1] == "**43.05**"


@pytest.mark.parametrize("number, llm, averages", [  # the AVG column as printed
    ("2", "gpt2-large", {"zero_shot": 36.04, "prompt_tuning": 38.17, "icl": 41.93, "hypertuning": 41.15,
                         "mend": 43.05}),
    ("2", "gpt2-xl", {"zero_shot": 35.63, "prompt_tuning": 39.64, "icl": 42.15, "hypertuning": 40.61,
                      "mend": 43.12}),
    ("2", "t5-large-lm-adapt",
     {"zero_shot": 34.81, "prompt_tuning": 34.07, "icl": 38.15, "hypertuning": 35.09, "mend": 39.79}),
    ("4", "gpt2-large", {"icl": 43.01, "mend": 43.65, "no_pretraining": 40.10, "clm": 42.92, "clm+kl": 42.24,
                         # printed for without_pred: 40.41, results/paper.json
                         "without_pred": 40.01, "without_distill": 40.64})])
def test_averages_of_the_papers_rows_are_the_printed_ones(number, llm, averages):
    rows = PAPER[number][llm]
    assert rows.keys() == averages.keys() and all(len(row) == (7 if number == "2" else 4)
                                                  for row in rows.values())
    differ = {name: np.mean([mean for mean, _ in row.values()]) - averages[name]
              for name, row in rows.items()}
    assert {name: d for name, d in differ.items() if abs(d) > (0.0101 if number == "2" else 0.0126)} == {}


def test_a_line_cut_short_is_left_out_and_the_file_is_not_touched(tmp_path):
    path = tmp_path / "results.jsonl"
    assert read_results(path) == []
    for text, n in (('{"a": 1}\n{"a": 2}\n', 2), ('{"a": 1}\n{"a": 2}', 2), ('{"a": 1}\n{"a": 2', 1),
                    ("", 0)):
        path.write_text(text)
        assert read_results(path) == [{"a": 1}, {"a": 2}][:n] and path.read_text() == text
    for text in ('{"a": 1\n{"a": 2}\n', "[1]\n"):
        path.write_text(text)
        with pytest.raises(UserError, match="is not a results file"):
            read_results(path)


@pytest.mark.parametrize(("field", "value"), [
    ("headline", "0.5"), ("headline", float("nan")), ("headline", 7.5), ("accuracy", None), ("n", -1),
    ("seed", "x"), ("task", ["a"]), ("k", 1.5), ("distill_len", None), ("demo_tokens", "x"),
    ("trained_on", {"pretrain": 5}), ("checkpoint", 3), ("method", True)])
def test_a_value_that_evaluation_cannot_have_written_is_refused(tmp_path, field, value):
    path = tmp_path / "results.jsonl"
    write_lines(path, [record(), record(**{field: value})])
    with pytest.raises(UserError, match=rf"results.jsonl is not a results file .*in a line {field} is "):
        read_results(path)


def test_table_flag_prints_the_table(tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    write_lines(path, [record(method=m, headline=h) for m, h in (("icl", 0.25), ("majority", 0.5))])
    final = evaluate.main(["--table", "2", str(path)])
    *table, last = capsys.readouterr().out.splitlines()
    assert table[0].startswith("| LLM | row |")  # and no word about presets
    assert json.loads(last) == final == {"table": "2", "files": [str(path)]}
    assert "| tiny | majority | **50.00** |" in table and "| tiny | icl | <u>25.00</u> |" in table


@pytest.mark.parametrize("argv, message", [(["5", "x"], "--table 5 is unknown; give one of 1, 2, 3, 4, 6, 7"),
                                           (["2"], "--table 2 needs at least one results file"),
                                           (["2", "/nowhere.jsonl"], "--table: /nowhere.jsonl is no file")])
def test_table_flag_errors(argv, message):
    with pytest.raises(UserError, match=message):
        evaluate.main(["--table", *argv])


def test_table_flag_lets_no_unknown_flag_pass(capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--table", "2", "x", "--limt", "3"])
    assert "unrecognized arguments: --limt 3" in capsys.readouterr().err


def test_methods_of_the_paper_are_known():
    assert {m for number in "26" for rows in PAPER[number].values() for m in rows} <= set(METHODS)


@pytest.mark.parametrize("file", sorted((common.ROOT / "results").glob("table*.jsonl")),
                         ids=lambda path: path.stem)
def test_committed_tables_are_those_of_the_committed_lines(file):
    lines = tables.table_lines(paper.summary.read_results(file), file.stem[len("table")])
    assert "\n".join(lines) + "\n" == file.with_suffix(".md").read_text(encoding="utf-8")


def test_a_setting_without_a_list_counts_the_tasks_at_hand():
    lines = [record(task=t, tasks="bigbench", split="functions", template=template)
             for t in ("list_functions-c001", "list_functions-c002") for template in ("space", "newline")]
    assert any("2 of 2 tasks" in line for line in table_lines(lines, "7"))


def test_mend_is_compared_with_rows_of_its_own_l_and_checkpoint_alone():
    rows = [line for task, own in (("a", 0.9), ("b", 0.7)) for line in (
        record(task=task, method="zero_shot", headline=0.1), record(task=task, method="icl", headline=0.8),
        record(task=task, method="last_l", distill_len=8, headline=0.5),
        mend(KL, FULL, task=task, headline=own),
        mend(KL, FULL, task=task, method="mend_constant", checkpoint="run@0", headline=0.2))]
    text = "\n".join(table_lines(rows, "2"))
    assert "mend minus icl: +0.00" in text and "mend minus zero_shot: +70.00" in text
    for row in ("last_l", "mend_constant"):
        assert f"class_to_class, {row}: of another l, number of segments or checkpoint" in text
        assert f"mend minus {row}" not in text
    for r in rows:
        r |= {"distill_len": 4} | ({"checkpoint": "run@1"} if r["checkpoint"] else {})
    text = "\n".join(table_lines(rows, "2"))
    assert "mend minus last_l: +30.00" in text and "mend minus mend_constant: +60.00" in text


def test_made_tasks_of_one_domain_are_one_cluster():
    """As in carried.py: three functions of verbs are one draw, and with one of nouns there are two."""
    gaps = {"verb: he": 0.2, "verb: she": 0.3, "verb: past": 0.4, "noun: plural": 0.1}
    rows = [line for task, gap in gaps.items() for line in (
        record(task=task, tasks="functions", method="last_l", headline=0.5),
        mend(KL, FULL, task=task, tasks="functions", headline=0.5 + gap))]
    mean = 25.0
    sums = [sum(100 * gaps[t] - mean for t in gaps if t.startswith(d)) for d in ("verb", "noun")]
    half = scipy.stats.t.ppf(0.975, 1) * (2 / 1 * sum(s * s for s in sums)) ** 0.5 / 4
    assert f"mend minus last_l: +25.00 [{mean - half:+.2f}, {mean + half:+.2f}]" in "\n".join(
        table_lines(rows, "2"))
