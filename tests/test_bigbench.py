"""Tests of bigbench.py on made-up archives (no example of BIG-bench is here), and of splits.json."""

import contextlib
import io
import json

import pytest
from archives import fake_families, make_world, read, tree, write_tar

import common
from sources import assets, bigbench

SEEDS = (100, 13, 21, 42, 87)
SETTINGS = ("hr_to_lr", "class_to_class", "non_class_to_class", "qa_to_qa", "non_qa_to_qa", "non_nli_to_nli",
            "non_para_to_para")


@pytest.fixture
def world(tmp_path, monkeypatch):
    return make_world(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The tasks of the made-up world: (folder, result, what was printed); tests only read them."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        argv, folder = make_world(tmp_path_factory.mktemp("world"), patch)
        return folder, assets.main([*argv, "--only", "tasks"]), printed.getvalue()


def test_layout_and_last_line(made):
    folder, result, printed = made
    assert json.loads(printed.splitlines()[-1]) == result
    assert result["tasks"]["tasks"] == 3 and result["tasks"]["examples"] == 100 + 120 + 2100
    shots = {f"16_{seed}_{part}" for seed in SEEDS for part in ("train", "dev", "test")}
    expected = {"colours": shots | {"16384_100_train"}, "shapes": shots, "words": {"16384_100_train"}}
    for task, files in expected.items():
        names = {path.name for path in (folder / "assets" / "bigbench" / task).iterdir()}
        assert names == {f"{task}_{name}.jsonl" for name in files}
    assert not (folder / "assets" / "bigbench" / "unlisted").exists()


def test_files_are_disjoint_and_counted(made):
    folder, *_ = made
    assert len(read(folder, "words_16384_100_train")) == 2000
    for task, n_test in {"colours": 50, "shapes": 60}.items():
        tests = [read(folder, f"{task}_16_{seed}_test") for seed in SEEDS]
        assert len(tests[0]) == n_test and all(test == tests[0] for test in tests)
        draws = []
        for seed in SEEDS:
            train, dev = (read(folder, f"{task}_16_{seed}_{part}") for part in ("train", "dev"))
            inputs = [row["input"] for row in train + dev + tests[0]]
            assert len(train) == len(dev) == 16 and len(set(inputs)) == len(inputs)
            draws.append(json.dumps(train))
        assert len(set(draws)) == len(SEEDS)  # the seeds draw different demonstrations
    pool = {row["input"] for row in read(folder, "colours_16384_100_train")}
    assert pool.isdisjoint(row["input"] for row in read(folder, "colours_16_13_test"))


def test_rows(made):
    folder, *_ = made
    rows = read(folder, "colours_16_13_test") + read(folder, "colours_16384_100_train")
    assert len({row["input"] for row in rows}) == len(rows) == 100  # the tie, the copy and the long one went
    for row in rows:
        assert list(row) == ["task", "input", "output", "options"] and row["task"] == "colours"
        number = int(row["input"].removeprefix("Is lamp ").removesuffix(" red?"))  # blanks are collapsed
        assert row["options"] == ["no", "yes"] and row["output"] == ["no", "yes"][number % 2]
    for row in read(folder, "shapes_16_42_train"):
        number = row["input"].split()[4]
        assert row["options"] == [f"box {number}", f"bin {number}", "none"]
        assert row["output"] == f"bin {number}"
    for row in read(folder, "words_16384_100_train"):
        assert row["options"] == [] and row["output"] == f"answer {row['input'][13:-1]}"  # the first target


def test_conversion_is_deterministic_and_ignores_the_order_of_the_archive(world):
    argv, folder = world
    assets.main([*argv, "--only", "tasks"])
    first = tree(folder / "assets" / "bigbench")
    shuffled = folder / "other.tar.gz"
    write_tar(shuffled, dict(reversed(fake_families().items())))
    again = folder / "again"
    again.mkdir()
    args = assets.get_parser().parse_args(argv)
    assets.convert_tasks([shuffled], again, args)
    assert tree(again) == {name: data for name, data in first.items() if name != "source.json"}


def test_a_family_that_is_too_small_is_named(world):
    argv, folder = world
    table = json.loads((folder / "splits.json").read_text())
    table["bigbench"]["task_type"]["absent"] = "free-form"
    table["bigbench"]["settings"]["one"]["train"].append("absent")
    (folder / "splits.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match="family absent: got 0 usable examples, expected at least 32"):
        assets.main([*argv, "--only", "tasks"])
    assert not (folder / "assets" / "bigbench").exists()
    table["bigbench"]["task_type"]["nowhere"] = "free-form"
    (folder / "splits.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match="nowhere.*in only one"):
        assets.main([*argv, "--only", "tasks"])


def test_a_subtask_can_be_a_task_of_its_own(world):
    """`shapes` is not listed then, so its other parts belong to no task."""
    argv, folder = world
    text = (folder / "splits.json").read_text()
    (folder / "splits.json").write_text(text.replace('"shapes"', '"shapes-part_a"'))
    families = fake_families()
    more = [{"input": f"toy {i}", "target_scores": {"a": 1, "b": 0}} for i in range(20)]
    families["shapes/part_a/task.json"]["examples"] += more
    out = folder / "out"
    out.mkdir()
    write_tar(folder / "other.tar.gz", families)
    assets.convert_tasks([folder / "other.tar.gz"], out, assets.get_parser().parse_args(argv))
    assert not (out / "shapes").exists()
    rows = [json.loads(line) for path in (out / "shapes-part_a").iterdir()
            for line in path.read_text().splitlines()]
    assert {row["task"] for row in rows} == {"shapes-part_a"}
    assert not any(row["input"].endswith("of b?") for row in rows)


def test_each_function_is_a_meta_test_task(made):
    folder, result, _ = made
    assert result["tasks"]["functions"] == {"lists": 2, "text": 1}
    here = {path.name for path in (folder / "assets" / "bigbench").iterdir() if "-" in path.name}
    assert here == {"lists-c001", "lists-c002", "text-comma_1"}  # c003 has 25 examples, and 26 are needed
    for task, n_dev, n_test in (("lists-c001", 4, 12), ("lists-c002", 4, 12), ("text-comma_1", 16, 100)):
        names = {path.name for path in (folder / "assets" / "bigbench" / task).iterdir()}
        parts = ("train", "dev", "test")  # and no pool
        assert names == {f"{task}_16_{seed}_{part}.jsonl" for seed in SEEDS for part in parts}
        for seed in SEEDS:
            rows = [read(folder, f"{task}_16_{seed}_{part}") for part in ("train", "dev", "test")]
            assert list(map(len, rows)) == [16, n_dev, n_test]
            assert len({row["input"] for part in rows for row in part}) == sum(map(len, rows))
            assert rows[2] == read(folder, f"{task}_16_100_test")


def test_options_of_a_function(made):
    """The gold answer once, at any place, and the answer of another function to the same input."""
    folder, *_ = made
    places = set()
    for task in ("lists-c001", "lists-c002", "text-comma_1"):
        for row in read(folder, f"{task}_16_13_test") + read(folder, f"{task}_16_13_train"):
            options = row["options"]
            assert len(options) == len(set(options)) == 8 and row["output"] in options
            places.add(options.index(row["output"]))
            if task == "text-comma_1":
                assert row["output"] == f"'land {int(row['input'].split()[1][:-1]) % 5}'"
                assert sum(option in {f"'land {i}'" for i in range(5)} for option in options) >= 4
                continue
            x = json.loads(row["input"])
            results = [str(x[1:] + x[:1]), str(x[::-1])]
            assert row["output"] == results[task == "lists-c002"] and set(results) <= set(options)
    assert places == set(range(8))


def test_variants():
    assert set(bigbench.list_variants([4, 4, 1])) >= {
        "[4, 4, 1]", "[1, 4, 4]", "[4]", "[1]", "[4, 1]", "[3]", "[9]", "[5, 5, 2]", "[4, 4]", "[]"}
    assert "[]" in bigbench.list_variants([])  # no list is too short
    assert {"'Rome, Italy'", "'Rome'", "'Italy'",
            "'Italy, Rome'"} <= set(bigbench.text_variants("'Rome, Italy'"))
    assert set(bigbench.text_variants("'Ada Hill', '3'")) >= {"'Ada Hill'", "'Ada'", "'3'", "'A. 3'"}
    assert {"walks", "walked", "klaw"} <= set(bigbench.text_variants("walk"))
    assert {"8", "52", "22"} <= set(bigbench.text_variants("30 - 22 ="))
    assert bigbench.text_variants("?!")  # no word in it


def test_no_setting_may_train_on_a_function(world):
    argv, folder = world
    table = json.loads((folder / "splits.json").read_text())
    table["bigbench"]["task_type"]["lists-c001"] = "free-form"
    table["bigbench"]["settings"]["one"]["train"].append("lists-c001")
    (folder / "splits.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match="got .'lists-c001'.* in 'task_type' and the family in 'functions'"):
        assets.main([*argv, "--only", "tasks"])


# splits.json


@pytest.fixture(scope="module")
def splits() -> dict:
    return json.loads((common.ROOT / "splits.json").read_text())


@pytest.mark.parametrize("table", ["metaicl", "bigbench"])
def test_splits_are_consistent(splits, table):
    settings, types = splits[table]["settings"], splits[table]["task_type"]
    assert tuple(settings) == SETTINGS
    assert set(types.values()) == {"classification", "multi-choice", "free-form"}
    assert set(types) == {task for split in settings.values() for side in split.values() for task in side}
    for name, split in settings.items():
        for side in split.values():
            assert len(set(side)) == len(side), f"{table} {name} names a task twice"
        shared = set(split["train"]) & set(split["test"])
        # MetaICL's own table trains and tests on sick here; the table keeps it, so that the counts agree.
        allowed = {"sick"} if (table, name) == ("metaicl", "non_nli_to_nli") else set()
        assert shared == allowed, f"{table} {name}"
        assert all(types[task] != "free-form" for task in split["test"]), f"{table} {name}"
    for kind in ("class", "qa"):
        assert settings[f"{kind}_to_{kind}"]["test"] == settings[f"non_{kind}_to_{kind}"]["test"]


def test_metaicl_counts(splits):
    settings = splits["metaicl"]["settings"]
    counts = [(len(settings[name]["train"]), len(settings[name]["test"])) for name in SETTINGS]
    assert counts == [(61, 26), (43, 20), (37, 20), (37, 22), (33, 22), (55, 8), (59, 4)]
    assert len(splits["metaicl"]["task_type"]) == 142
    assert sum("dbpedia_14" in split["train"] + split["test"] for split in settings.values()) == 6


def test_bigbench_keeps_the_kinds_apart(splits):
    settings, types = splits["bigbench"]["settings"], splits["bigbench"]["task_type"]
    assert all(len(split["test"]) >= 5 for split in settings.values())
    classification = {task for task, kind in types.items() if kind == "classification"}
    by_class, by_qa = settings["class_to_class"], settings["qa_to_qa"]
    assert set(by_class["train"] + by_class["test"]) == classification
    assert set(settings["non_class_to_class"]["train"]) == set(types) - classification
    assert set(settings["non_qa_to_qa"]["train"]) == set(types) - set(by_qa["train"] + by_qa["test"])
    for name in ("non_nli_to_nli", "non_para_to_para"):
        assert not set(settings[name]["train"]) & set(settings[name]["test"])
    assert set(settings["non_nli_to_nli"]["train"]) <= classification
    assert "analytic_entailment" not in settings["non_nli_to_nli"]["train"]  # nli, but too small to test on


def test_no_bigbench_setting_holds_a_family_of_functions(splits):
    table = splits["bigbench"]
    assert set(table["functions"]) == {"language_games", "linguistic_mappings", "list_functions",
                                       "mult_data_wrangling", "unnatural_in_context_learning"}
    families = {task.partition("-")[0] for task in table["task_type"]}
    assert not families & set(table["functions"])
    plan = bigbench.load_plan(str(common.ROOT / "splits.json"))
    for family, subtask, task in (
            ("list_functions", "c001", "list_functions-c001"), ("list_functions", "01_shot_baseline", None),
            ("linguistic_mappings", "plural_json", "linguistic_mappings-plural_json"),
            ("linguistic_mappings", "plural_regular_json", None),
            ("linguistic_mappings", "de_past_tense_json", None),
            ("mult_data_wrangling", "login_1_names_2", None), ("mult_data_wrangling", "", None),
            ("gem", "xsum", "gem-xsum"), ("gem", "turk", None), ("hhh_alignment", "honest", "hhh_alignment")):
        assert bigbench.task_of(family, subtask, plan) == task


def test_splits_file_is_readable():
    lines = (common.ROOT / "splits.json").read_text().splitlines()
    assert max(map(len, lines)) < 110 and len(lines) < 500
