"""Tests of carried.py: means, gains and gaps by hand."""

import json

import pytest
from conftest import example, write_lines

from common import UserError
from paper import carried, tables
from paper.summary import require_one_setting


def lines(method: str, headlines: dict[str, float], distill_len: int, seed: int = 100) -> list[dict]:
    return [{"method": method, "task": task, "seed": seed, "headline": headline, "accuracy": headline / 2,
             "n": 8, "distill_len": distill_len, "demo_tokens": 60} for task, headline in headlines.items()]


BOTH = [*lines("zero_shot", {"verb: past": 0.1, "verb: she": 0.1, "date: year": 0.3}, 32),
        *lines("icl", {"verb: past": 0.5, "verb: she": 0.9, "date: year": 0.2}, 32)]


def test_functions_of_a_domain_are_one_cluster():
    tasks = ["verb: past", "ethos-race", "date: year", "ag_news", "verb: she", "ethos-religion"]
    clusters = [["ag_news"], ["date: year"], ["ethos-race", "ethos-religion"], ["verb: past", "verb: she"]]
    assert sorted(sorted(names) for names in tables.clusters_of(tasks, {})) == clusters
    linked = tables.clusters_of(tasks, {"ethos-race": {"x", "y"}, "ag_news": {"y"}})  # all three are one
    assert sorted(map(len, linked)) == [1, 2, 3]


def test_tasks_that_are_linked_by_a_query_are_one_cluster(tmp_path):
    """a and c share none, b one with each; of d only what it shows is shared."""
    for folder in "abcde":
        (tmp_path / folder).mkdir()
    for task, queries in {"a": "pq", "b": "rs", "c": "st", "d": "uv", "e": "w"}.items():
        for seed, x in zip((100, 13), queries, strict=False):
            write_lines(tmp_path / task / f"{task}_16_{seed}_test.jsonl", [example(x)])
            write_lines(tmp_path / task / f"{task}_16_{seed}_train.jsonl", [example("p")])
    write_lines(tmp_path / "b" / "b_16_13_test.jsonl", [example("s"), example("q")])
    inputs = carried.inputs_in(str(tmp_path), [*"abcde"])
    found = tables.clusters_of([*"abcde"], inputs)
    assert sorted(sorted(cluster) for cluster in found) == [["a", "b", "c"], ["d"], ["e"]]
    with pytest.raises(UserError, match="has no queries of f; give their folder"):
        carried.inputs_in(str(tmp_path), ["a", "f"])


def test_figures_by_hand():
    records = [*BOTH, *lines("mend", {"verb: past": 0.5, "verb: she": 0.5, "date: year": 0.2}, 16),
               *lines("last_l", {"verb: past": 0.4, "verb: she": 0.2, "date: year": 0}, 16),
               *lines("mend", {"verb: past": 0.1, "verb: she": 0.1, "date: year": 0.1}, 8)]
    made = carried.carried(records)
    assert made["tokens"] == 60 and list(made["methods"]) == [16, 8]
    first, second = made["methods"][16], made["methods"][8]
    assert first["mend"]["mean"] == pytest.approx(40) and first["mend"]["accuracy"] == pytest.approx(20)
    # icl gains on the two verbs alone: (0.5 - 0.1) / (0.7 - 0.1)
    assert first["mend"]["gain"] == pytest.approx(2 / 3) and second["mend"]["gain"] == pytest.approx(0)
    gap = first["last_l"]["gap"]  # of 10, 30 and 20 points: two clusters, whose residuals sum to 0
    assert (gap["gap"], gap["tasks"]) == (pytest.approx(20), 3)
    assert gap["high"] - gap["low"] == pytest.approx(0, abs=1e-9)
    assert first["mend"]["gap"] is None


def test_icl_is_set_against_its_own_control():
    swapped = {"verb: past": 0.2, "verb: she": 0.6, "date: year": 0.2}
    made = carried.carried([*BOTH, *lines("icl_swapped", swapped, 32),
                            *lines("mend", {"verb: past": 0.5, "verb: she": 0.5, "date: year": 0.2}, 16)])
    gap = {method: made["methods"][16][method]["gap"] for method in ("icl_swapped", "icl")}
    assert [gap[m]["gap"] for m in gap] == pytest.approx([20, -40 / 3])
    assert any("| 16 | icl_swapped | 33.3 |" in line and "| ICL +20.0 [" in line
               for line in carried.table_lines("x", made))


def test_trained_baselines_have_rows_and_segments_are_named():
    made = carried.carried([{**r, "segments": 4} for r in [
        *BOTH, *lines("hypertuning", {"verb: past": 0.5, "verb: she": 0.5, "date: year": 0.2}, 16)]])
    assert list(made["methods"][16]) == ["zero_shot", "hypertuning", "icl"]
    assert "in 4 segments of l vectors each" in carried.table_lines("x", made)[0]


def test_command(tmp_path, capsys):
    path = tmp_path / "ratios-x.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in [
        *BOTH, *lines("mend", {"verb: past": 0.5, "verb: she": 0.5, "date: year": 0.2}, 16)]))
    with pytest.raises(UserError, match="the results lack checkpoint"):
        carried.main([str(path)])
    with pytest.raises(UserError, match="has no lines"):
        carried.main([str(tmp_path / "none.jsonl")])
    print("\n".join(carried.table_lines("x", carried.carried(carried.read_results(path)))))
    out = capsys.readouterr().out
    assert "x: 3 tasks, 24 queries a set, 1 sets, 60 tokens" in out
    assert "| 16 | mend | 40.0 | 20.0 | 67% |  |" in out


@pytest.mark.parametrize(("field", "values"), [("checkpoint", ("a@1", "b@2")), ("k", (16, 8)),
                                               ("limit", (0, 8)), ("template", ("newline", "space"))])
def test_lines_of_two_settings_share_no_mean(field, values):
    setting = {"checkpoint": "a@1", "k": 16, "limit": 0, "template": "space"}
    require_one_setting("r.jsonl", [setting, setting | {"checkpoint": None}])  # as icl's lines have none
    records = [setting | {field: value} for value in values]
    with pytest.raises(UserError, match=f"r.jsonl has lines of {field} {values[0]} and "):
        require_one_setting("r.jsonl", records)
