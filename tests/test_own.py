"""Your own tasks. The oracle of a cut is the same data laid out by hand in MetaICL's way."""

import json
import shlex
from pathlib import Path

import pytest
from conftest import make_distiller, read_lines, save_distiller
from conftest import write_lines as write_flat
from training import state_of

import common
import distill
import evaluate
import paper.collection as collection
import train_finetune
import train_pretrain
from common import UserError
from loading import load_checkpoint
from paper import figures
from sources.own import OwnTasks, columns_of, load_own, read_task
from sources.tasks import SEEDS, load_tasks

PLACES = ("harbour", "tower", "market", "bridge", "school", "garden")


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_flat(path, rows)


def rows_of(task: str, n: int) -> list[dict]:
    """n examples of a task whose label is told by the text's first word."""
    words = {"support": ("refund", "login"), "reviews": ("bad", "good"), "mails": ("spam", "ham")}[task]
    return [{"input": f"{words[i % 2]} {PLACES[i % 6]} {PLACES[i // 6 % 6]} {i}", "output": words[i % 2]}
            for i in range(n)]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three tasks of plain lines, one of them as a table."""
    own = tmp_path / "mine"
    write_lines(own / "support.jsonl", rows_of("support", 40))
    write_lines(own / "mails.jsonl", rows_of("mails", 50))
    lines = ["text,label", *(f'"{r["input"]}",{r["output"]}' for r in rows_of("reviews", 60))]
    (own / "reviews.csv").write_text("\n".join(lines) + "\n")
    (own / "notes.txt").write_text("nothing to read\n")
    return own


@pytest.fixture
def lines_only(folder) -> Path:
    (folder / "reviews.csv").unlink()
    return folder


@pytest.fixture
def flags(llama) -> list[str]:
    return ["--preset", "pocket", "--llm", str(llama), "--device", "cpu", "--dtype", "fp32"]


@pytest.fixture
def training(flags) -> list[str]:
    return [*flags, "--distiller", "layers:2", "--distill-len", "4", "--steps", "2", "--eval-every", "2",
            "--batch-size", "2", "--eval-queries", "2", "--vector-start", "matched"]


def test_a_cut_is_a_partition_by_seed(lines_only):
    tasks = load_own(str(lines_only), "class_to_class", 16)
    assert isinstance(tasks, OwnTasks) and (tasks.train, tasks.test) == ([], ["mails", "support"])
    for task, n in (("mails", 50), ("support", 40)):
        orders = set()
        for seed in SEEDS:
            parts = tasks.files(task, seed)
            everything = [(e["input"], e["output"]) for part in parts.values() for e in part]
            assert sorted(everything) == sorted((r["input"], r["output"]) for r in rows_of(task, n))
            n_dev = (n - 16) // 3
            assert [len(parts[p]) for p in ("train", "dev", "test")] == [16, n_dev, n - 16 - n_dev]
            assert parts == load_own(str(lines_only), "x", 4).files(task, seed)  # K below 16 changes nothing
            orders.add(tuple(everything))
        assert len(orders) == len(SEEDS)
        others = [load_own(str(lines_only), "x", k).files(task, seed) for k in (4, 20) for seed in SEEDS]
        dev = others[0]["dev"]  # selects a checkpoint; asked in no evaluation
        assert all(o["dev"] == dev and not any(e in dev for e in o["test"] + o["train"]) for o in others)
        assert all(e["options"] == sorted({"support": ("refund", "login"), "mails": ("spam", "ham")}[task])
                   for e in tasks.pool(task)) and tasks.types[task] == "classification"
    assert tasks.data_hash("mails", 100) != tasks.data_hash("mails", 13)


def test_a_cut_evaluates_like_metaicls_layout_by_hand(lines_only, tmp_path, flags):
    """The same parts, written out as files of MetaICL's."""
    own = load_own(str(lines_only), "class_to_class", 16)
    for task in own.test:
        for part, examples in own.files(task, 100).items():
            write_lines(tmp_path / "laid" / task / f"{task}_16_100_{part}.jsonl", examples)
    argv = [*flags, "--methods", "zero_shot", "icl", "majority", "--seeds", "100", "--k", "4", "--out"]
    evaluate.main([*argv, str(tmp_path / "a.jsonl"), "--tasks", str(lines_only)])
    evaluate.main([*argv, str(tmp_path / "b.jsonl"), "--tasks", str(tmp_path / "laid")])
    shown = ("method", "task", "seed", "split", "n", "macro_f1", "accuracy", "headline", "demo_tokens")
    a, b = ([{name: r[name] for name in shown} for r in read_lines(tmp_path / f"{x}.jsonl")] for x in "ab")
    assert a == b and {r["split"] for r in a} == {"own"} and len(a) == 6


def test_train_on_own_tasks_and_evaluate_on_one_held_out(folder, tmp_path, flags, training, capsys):
    named = ["--tasks", str(folder), "--columns", "input=text", "output=label"]
    with pytest.raises(UserError, match=r"mails.jsonl, line 1 has no text and no label, only input, output"):
        train_finetune.main([*training, *named, "--test-tasks", "support"])
    text = (folder / "reviews.csv").read_text().replace("text,label", "input,output")
    (folder / "reviews.csv").write_text(text)
    out = tmp_path / "run"
    final = train_finetune.main([*training, "--tasks", str(folder), "--test-tasks", "supp*", "--init-from",
                                 "none", "--k", "4", "--queries-per-demo", "2", "--out-dir", str(out)])
    assert final["split"] == "own" and "2 meta-training and 1 meta-test tasks" in capsys.readouterr().out
    assert [*state_of(out)["trained_on"]["finetune"]["own_tasks"]] == ["mails", "reviews"]
    argv = [*flags, "--tasks", str(folder), "--methods", "mend", "mend_swapped", "--seeds", "100", "--k", "4",
            "--checkpoint", str(out), "--limit", "3", "--out", str(tmp_path / "r.jsonl")]
    with pytest.raises(UserError, match="was finetuned on the examples of mails, reviews; evaluate it on"):
        evaluate.main(argv)
    (folder / "mails.jsonl").rename(folder / "renamed.jsonl")  # the examples are the same, but one less
    write_lines(folder / "renamed.jsonl", rows_of("mails", 49)[::-1])
    with pytest.raises(UserError, match="was finetuned on the examples of renamed; evaluate it on others"):
        evaluate.main([*argv, "--test-tasks", "renamed", "support"])
    found = evaluate.main([*argv, "--methods", "mend", "--test-tasks", "support"])
    assert found["tasks"] == 1 and [r["task"] for r in read_lines(tmp_path / "r.jsonl")] == ["support"]
    with (folder / "reviews.csv").open("a") as file:
        file.write("bad weather,bad\n")
    write_lines(folder / "mails.jsonl", rows_of("mails", 50))
    with pytest.raises(UserError, match="--resume: .* was trained with finetune hash"):
        train_finetune.main([*training, "--tasks", str(folder), "--test-tasks", "supp*", "--init-from",
                             "none", "--k", "4", "--queries-per-demo", "2", "--out-dir", str(out),
                             "--resume"])


@pytest.mark.parametrize("trained, evaluated, refused", [
    (range(1000), range(100), True), (range(1000), range(400, 800), True),  # parts of what was seen
    (range(100), range(2000), True), (range(1000), range(700, 2700), False),  # all of it; less than a half
    (range(30), range(20), True), (range(30), range(16, 46), False), (range(1000), range(1000, 1100), False)])
def test_a_part_or_a_superset_of_what_was_trained_on_is_known_again(tmp_path, trained, evaluated, refused):
    rows = rows_of("mails", 2700)
    for name, which in (("a", trained), ("b", evaluated)):
        write_lines(tmp_path / f"{name}.jsonl", [rows[i] for i in which])
    tasks = load_own(str(tmp_path), "class_to_class", 16)
    tasks.train, tasks.test = ["a"], ["b"]
    assert tasks.seen(tasks.record()["own_tasks"]) == (["b"] if refused else [])


def test_a_split_file(folder, tmp_path, flags, training):
    split = tmp_path / "mine.json"
    types = {"mails": "multi-choice"}
    split.write_text(json.dumps({"train": ["support"], "test": ["mails"], "types": types}))
    tasks = load_tasks(str(folder), str(split))
    assert (tasks.train, tasks.test, tasks.split) == (["support"], ["mails"], "mine")
    assert tasks.types == {"mails": "multi-choice", "support": "classification"}
    final = train_finetune.main([*training, "--tasks", str(folder), "--split", str(split), "--init-from",
                                 "none", "--k", "4", "--queries-per-demo", "2", "--out-dir",
                                 str(tmp_path / "run")])
    assert final["split"] == "mine"


@pytest.mark.parametrize("text, message", [
    ("{", "cannot be read"), ("[]", "cannot be read"), ('{"train": "support"}', "expected {"),
    ("{}", "expected {"),
    ('{"test": ["suport"]}', "there is no task 'suport'; did you mean support"),
    ('{"train": ["mails"], "test": ["mails"]}', "mails cannot be in meta-train and in meta-test")])
def test_a_split_file_that_is_none(folder, tmp_path, text, message):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(UserError, match=message):
        load_tasks(str(folder), str(tmp_path / "s.json"))


def test_metaicls_tasks_under_a_split_of_ones_own(tasks_dir, tmp_path):
    """A folder in MetaICL's layout, trained on what the paper tests."""
    own = {"train_tasks": ["emo"], "test_tasks": ["ag_news"]}
    tasks = load_tasks(str(tasks_dir), "class_to_class", own=own)
    files = load_tasks(str(tasks_dir), "class_to_class").files("ag_news", 13)
    assert tasks.files("ag_news", 13) == files and tasks.is_cut("ag_news")
    assert len(tasks.pool("emo")) > 20 and tasks.types["ag_news"] == "classification"


def test_own_tasks_beside_made_ones(lines_only):
    tasks = load_tasks(["functions", str(lines_only)], "class_to_class", own={"test_tasks": ["mails"]})
    assert "support" in tasks.train and "mails" in tasks.test and tasks.is_own() and tasks.split == "own"
    assert tasks.record().keys() == {"own_tasks"} and len(tasks.files("mails", 100)["train"]) == 16
    assert tasks.partner("mails", tasks.test) != "mails"  # though no other of its collection is there
    with pytest.raises(UserError, match="stands in two collections"):
        load_tasks([str(lines_only), str(lines_only / "mails.jsonl")], "class_to_class")


def test_own_tasks_beside_metaicls_keep_its_split(lines_only, tasks_dir, tmp_path, flags, training):
    """So that a checkpoint of both is refused on what either has trained it on."""
    both = ["--tasks", str(tasks_dir), str(lines_only)]
    argv = [*training, *both, "--init-from", "none", "--k", "4", "--queries-per-demo", "2"]
    own = load_tasks(both[1:], "class_to_class")
    assert own.split == "class_to_class" and {"mails", "support", "ag_news", "emo"} <= {*own.test}
    final = train_finetune.main([*argv, "--out-dir", str(tmp_path / "run")])
    assert final["split"] == "class_to_class"
    found = evaluate.main([*flags, *both, "--methods", "mend", "--seeds", "13", "--k", "4", "--limit", "2",
                           "--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "r.jsonl")])
    assert found["tasks"] == 4


def test_no_input_stands_in_two_parts_whatever_its_labels(tmp_path):
    rows = [{"input": f"text {i}", "output": label} for i in range(40) for label in ("a", "b")]
    write_lines(tmp_path / "t.jsonl", rows)
    parts = load_own(str(tmp_path), "x", 16).files("t", 100)
    inputs = [e["input"] for part in parts.values() for e in part]
    assert len(inputs) == len(set(inputs)) == 40


def test_a_parquet_table_with_class_numbers(tmp_path):
    import datasets
    rows = rows_of("reviews", 30)
    features = datasets.Features({"text": datasets.Value("string"),
                                  "label": datasets.ClassLabel(names=["bad", "good"])})
    table = datasets.Dataset.from_dict({
        "text": [r["input"] for r in rows], "label": [int(r["output"] == "good") for r in rows]},
        features=features)
    table.to_parquet(tmp_path / "reviews.parquet")
    tasks = load_own(str(tmp_path / "reviews.parquet"), "x", 16, columns=["input=text", "output=label"])
    found = [(e["input"], e["output"]) for e in tasks.pool("reviews")]
    assert found == [(r["input"], r["output"]) for r in rows]


BROKEN = [
    ({"input": "a"}, "line 3 has no output, only input"), ({"input": " ", "output": "x"}, "must be text"),
    ({"input": ["a"], "output": "x"}, "must be text"), ({"input": "a", "output": True}, "must be text"),
    ({"input": "a", "output": "x", "options": "xy"}, "options must be a list"),
    ({"input": "a", "output": "x", "options": ["y"]}, "the output 'x' is none of its options"),
    ("[]", "line 3"),
    (b"\xff", "cannot be read as UTF-8")]


@pytest.mark.parametrize("row, message", BROKEN)
def test_a_broken_line_is_named(tmp_path, row, message):
    good = b"".join(json.dumps(r).encode() + b"\n" for r in rows_of("mails", 2))
    last = row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()
    (tmp_path / "t.jsonl").write_bytes(good + last + b"\n")
    with pytest.raises(UserError, match=f"t.jsonl.*{message}"):
        load_own(str(tmp_path), "x", 16)


def test_what_cannot_be_a_task(tmp_path, flags, training, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    from sources.hub import hub_reachable
    hub_reachable.cache_clear()
    (tmp_path / "empty").mkdir()
    cases = [("empty", "holds no task; expected files"), ("no/such/place", "does not exist"),
             ("nosuch", "is no file or folder, and a data set would come from the model hub")]
    for spec, message in cases:
        with pytest.raises(UserError, match=message):
            load_tasks(str(tmp_path / spec) if spec == "empty" else spec, "class_to_class")
    write_lines(tmp_path / "few" / "t.jsonl", rows_of("mails", 17))
    with pytest.raises(UserError, match="task t has 17 different inputs, and 18 are needed"):
        load_own(str(tmp_path / "few"), "x", 16).files("t", 100)
    write_lines(tmp_path / "one" / "t.jsonl", [{"input": str(i), "output": "a"} for i in range(30)])
    with pytest.raises(UserError, match="has one label only, 'a'"):
        load_own(str(tmp_path / "one"), "x", 16)
    write_lines(tmp_path / "free" / "t.jsonl", [{"input": str(i), "output": f"{i} times"} for i in range(30)])
    with pytest.raises(UserError, match="it has no options"):
        evaluate.main([*flags, "--tasks", str(tmp_path / "free"), "--methods", "icl", "--seeds", "100",
                       "--out", str(tmp_path / "r.jsonl")])
    write_lines(tmp_path / "twice" / "t.jsonl", rows_of("mails", 20))
    (tmp_path / "twice" / "t.csv").write_text("input,output\na,b\n")
    with pytest.raises(UserError, match="are both the task t"):
        load_own(str(tmp_path / "twice"), "x", 16)
    for table, message in (("a,b,c\n", "row 1 has not as many cells"), ("a\n", "row 1 has not as many cells"),
                           ("", "t.csv is empty"), (",b\n", "row 1: input must be text"),
                           ('"a,b\n', "cannot be read after row 0"), ("a,b\nc,\xe9\n", "after row")):
        (tmp_path / "twice" / "t.csv").write_bytes(f"input,output\n{table}".encode("latin-1"))
        with pytest.raises(UserError, match=message):
            load_own(str(tmp_path / "twice" / "t.csv"), "x", 16)
    write_lines(tmp_path / "single" / "t.jsonl", [{"input": "a", "output": "b", "options": ["b", "b"]}])
    with pytest.raises(UserError, match="line 1: one option is no choice; give two, or none"):
        load_own(str(tmp_path / "single"), "x", 16)
    for columns, message in ((["text"], "--columns text: expected input=NAME"), (["x=y"], "--columns x=y")):
        with pytest.raises(UserError, match=message):
            load_own(str(tmp_path / "twice" / "t.csv"), "x", 16, columns=columns)
    with pytest.raises(UserError, match="--train-tasks bills is no task of"):
        load_own(str(tmp_path / "few"), "x", 16, train_tasks=["bills"])
    with pytest.raises(UserError, match="has no meta-training tasks; give another one, or, of your own"):
        train_finetune.main([*training, "--tasks", str(tmp_path / "few"), "--out-dir", str(tmp_path / "run")])


def test_several_places_share_out_their_tasks_and_swap_across_them(tmp_path):
    for name, task in (("a", "mails"), ("b", "reviews"), ("c", "support")):
        write_lines(tmp_path / f"{name}.jsonl", rows_of(task, 60))
    places = [str(tmp_path / f"{name}.jsonl") for name in "abc"]
    tasks = load_tasks(places, "x", k=16)
    assert [tasks.partner(task, ["a", "b", "c"]) for task in "abc"] == ["b", "c", "a"]  # each alone
    alone = load_own(places[1], "x", 16)
    assert tasks.retrieval_pool("b", 100) == alone.retrieval_pool("b", 100) != []
    tasks = load_tasks(places, "x", k=16, own={"test_tasks": ["b"]})
    assert (tasks.train, tasks.test) == (["a", "c"], ["b"])
    (tmp_path / "s.json").write_text('{"train": ["a"], "test": ["c"]}')
    tasks = load_tasks(places, str(tmp_path / "s.json"), k=16, own={})
    assert (tasks.train, tasks.test) == (["a"], ["c"])
    with pytest.raises(UserError, match="--test-tasks d is no task of .*a.jsonl .*c.jsonl"):
        load_tasks(places, "x", k=16, own={"test_tasks": ["a", "d"]})
    (tmp_path / "s.json").write_text('{"train": ["a"], "test": ["d"]}')
    with pytest.raises(UserError, match="there is no task 'd'"):
        load_tasks(places, str(tmp_path / "s.json"), k=16, own={})


def test_training_on_all_own_tasks_leaves_none_to_look_at(tmp_path, training):
    write_lines(tmp_path / "mails.jsonl", rows_of("mails", 60))
    with pytest.raises(UserError, match="leaves no meta-test task to evaluate on; leave one out of training"):
        train_finetune.main([*training, "--tasks", str(tmp_path / "mails.jsonl"), "--train-tasks", "*",
                             "--init-from", "none"])


def test_cells_of_a_csv_are_text_as_it_stands(tmp_path):
    labels = ["000", "1.50", "None", "NA", "True", "007"]
    rows = [f'"{i}, or so",{labels[i % 6]}' for i in range(40)]
    (tmp_path / "t.csv").write_text("\ufeffinput,output\n" + "\n".join(rows) + "\n", encoding="utf-8")
    examples = load_own(str(tmp_path / "t.csv"), "x", 16).examples("t")
    for i, e in enumerate(examples):
        assert (e["input"], e["output"]) == (f"{i}, or so", labels[i % 6])
    assert examples[0]["options"] == sorted(labels)
    (tmp_path / "o.csv").write_text('input,output,options\na,x,"[""x"", ""y""]"\nb,y,"[""x"", ""y""]"\n')
    assert all(e["options"] == ["x", "y"] for e in load_own(str(tmp_path / "o.csv"), "x", 16).examples("o"))
    (tmp_path / "o.csv").write_text("input,output,options\na,x,x or y\n")
    with pytest.raises(UserError, match="row 1: options must be a list"):
        load_own(str(tmp_path / "o.csv"), "x", 16)


def test_pretraining_needs_no_tasks(training, corpus_dir, tmp_path, capsys):
    argv = [*training, "--steps", "4", "--corpus", str(corpus_dir), "--window", "64", "--min-doc-len", "32",
            "--eval-docs", "4", "--out-dir", str(tmp_path / "run")]
    final = train_pretrain.main(argv)
    assert "the best checkpoint is the one of the lowest held-out KL" in capsys.readouterr().out
    kl = [r["heldout_kl"] for r in read_lines(tmp_path / "run" / "metrics.jsonl") if "heldout_kl" in r]
    assert len(kl) == 3 and final["best_heldout_kl"] == min(kl) and "dev_option_ce" not in final
    _, best = load_checkpoint(tmp_path / "run")
    assert best["best_by"] == "heldout_kl" and best["metrics"]["heldout_kl"] == min(kl)
    assert train_pretrain.main([*argv, "--resume"]) == final
    figures.main(["curves", str(tmp_path / "run"), "--out", str(tmp_path / "figures")])
    assert (tmp_path / "figures" / "curves.png").stat().st_size > 5000


def test_data_shows_own_tasks(lines_only, flags, capsys):
    argv = ["--preset", "pocket", "--llm", flags[3], "--tasks", str(lines_only)]
    found = collection.main(argv)
    assert found["test"]["tasks"] == 2 and found["split"] == "own"
    with pytest.raises(UserError, match="of your own tasks, name some with --train-tasks"):
        collection.main([*argv, "--show", "2"])
    assert collection.main([*argv, "--show", "2", "--train-tasks", "support"])["task"] == "support"
    assert "refund" in capsys.readouterr().out


def test_vectors_of_own_tasks_and_retrieval(lines_only, flags, tmp_path, llama_llm):
    checkpoint = save_distiller(tmp_path / "run", make_distiller(llama_llm), llama_llm, "layers:2")
    argv = [*flags, "--tasks", str(lines_only), "--checkpoint", str(checkpoint), "--seeds", "13", "--k", "4",
            "--limit", "4", "--out", str(tmp_path / "r.jsonl"), "--methods", "mend"]
    evaluate.main([*argv, "mend_swapped", "mend_constant"])
    evaluate.main([*argv, "--retrieve", "bm25"])
    lines = read_lines(tmp_path / "r.jsonl")
    assert len(lines) == 8 and {(r["tasks"], r["n"]) for r in lines} == {("own-mine", 4)}
    assert all((r["swapped_with"] is None) == (r["method"] == "mend") for r in lines)


def commands(document: str, start: str) -> list[list[str]]:
    """The commands of the first block of a document that begins with `start`."""
    text = (common.ROOT / document).read_text(encoding="utf-8")
    block = text[text.index(f"```\n{start}"):].split("```")[1]
    return [shlex.split(line)[1:] for line in block.strip().splitlines()]


@pytest.mark.parametrize("document, first", [("README.md", "--llm NAME"), ("docs/own.md", "--corpus")])
def test_the_case_of_the_documents(document, first, folder, training, flags, tmp_path, monkeypatch, llama):
    """Its commands as they stand, on tiny tasks, with a tiny LLM and few steps."""
    monkeypatch.chdir(tmp_path)
    (folder / "support.jsonl").rename(folder / "support_tickets.jsonl")
    table = (folder / "reviews.csv").read_text()
    (folder / "reviews.csv").write_text(table.replace("text,label", "input,output"))
    (tmp_path / "notes.txt").write_text("\n\n".join(f"{p} {q} {r} stands by the {p}." * 6 for p in PLACES
                                                    for q in PLACES for r in PLACES))
    scripts = {"train_pretrain.py": (train_pretrain, [*training, "--window", "32", "--min-doc-len", "16",
                                                      "--eval-docs", "2", "--distill-len", "4"]),
               "train_finetune.py": (train_finetune, [*training, "--k", "4", "--queries-per-demo", "2"]),
               "evaluate.py": (evaluate, [*flags, "--k", "4", "--limit", "2", "--seeds", "100"]),
               "distill.py": (distill, flags[2:])}
    done = []
    for name, *argv in commands(document, f"python train_pretrain.py {first}"):
        script, more = scripts[name]
        done.append(script.main([*[str(llama) if a == "NAME" else a for a in argv], *more]))
    assert done[1]["split"] == "own" and done[2]["tasks"] == 1 and "mend" in done[2]["headline"]
    assert document == "README.md" or (tmp_path / "vectors.safetensors").exists()


def test_tables_with_tabs_endings_in_capitals_and_what_is_left_out(tmp_path, capsys):
    rows = [(f"text {i}", "yes" if i % 2 else "no") for i in range(20)]
    lines = "\n".join("\t".join(row) for row in [("input", "output"), *rows])
    (tmp_path / "tabs.tsv").write_text(lines)
    write_flat(tmp_path / "CAPITALS.JSONL", [{"input": x, "output": y} for x, y in rows])
    (tmp_path / "notes.json").write_text("{}")
    tasks = load_own(str(tmp_path), "class_to_class", 16)
    assert sorted(tasks.test) == ["CAPITALS", "tabs"]
    assert [[(e["input"], e["output"]) for e in tasks.pool(task)] for task in tasks.test] == [rows, rows]
    assert "note: no task, as neither .jsonl[.gz], .csv, .tsv nor .parquet: notes" in capsys.readouterr().out
    (tmp_path / "semi.csv").write_text(lines.replace("\t", ";"))
    with pytest.raises(UserError, match="semi.csv has one column, 'input;output'; separate cells"):
        load_own(str(tmp_path), "class_to_class", 16)


def test_the_hint_to_lower_k_only_where_that_helps(tmp_path):
    write_flat(tmp_path / "few.jsonl", [{"input": str(i), "output": "ab"[i % 2]} for i in range(17)])
    for k, hint in ((4, False), (16, False), (20, True)):
        with pytest.raises(UserError, match="17 different inputs, and .* are needed") as fault:
            load_own(str(tmp_path), "class_to_class", k).files("few", 100)
        assert ("lower --k" in str(fault.value)) == hint


def test_a_tsv_has_no_quotes(tmp_path):
    rows = [('"Good" film', "yes"), ('a "bad one', "no"), ("plain", "yes"), ("so, so", "no")]
    (tmp_path / "t.tsv").write_text("\n".join("\t".join(row) for row in [("input", "output"), *rows]))
    assert [(e["input"], e["output"]) for e in read_task("t", tmp_path / "t.tsv", columns_of(None))] == rows
    (tmp_path / "t.tsv").write_text("input\toutput\na\tb\tc\n")
    with pytest.raises(UserError, match="row 1 has not as many cells as the first line, where tabs part"):
        read_task("t", tmp_path / "t.tsv", columns_of(None))
