"""Nothing lost, nothing false: faults of the numbers, of what is read, of the machine, and of two at once."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import load, make_distiller, read_lines, save_distiller, write_lines
from safetensors.torch import load_file, save_file
from training import assert_same, metrics, state_of, stub_dev, train

import common
import distill
import evaluate
import loading
import run
import sources.tasks
import train_finetune
import train_pretrain
from common import UserError
from data import Corpus
from loading import load_checkpoint, load_distiller, load_llm
from serving.vectors import read_vectors, save_vectors
from sources import assets, files
from sources.files import HOST, held
from sources.tasks import read_examples, require_options

# Numbers that mean nothing


def changed(folder: Path, target: Path, change) -> Path:
    """A copy of a model's folder whose tensors went through change(tensors)."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def spoil(value: float, name: str = "model.layers.1.mlp.up_proj.weight"):
    def change(tensors):
        tensors[name][2, 3] = value
    return change


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_llm_with_a_weight_that_is_no_number_is_refused_by_its_name(llama, tmp_path, value):
    bad = changed(llama, tmp_path / "bad", spoil(value))
    with pytest.raises(UserError, match=r"bad holds numbers that are not finite, in model\.layers\.1\.mlp"):
        load_llm(str(bad), torch.device("cpu"), torch.float32)


def overflowing(tensors):
    for name in list(tensors):
        if "norm" in name:
            tensors[name] *= 1e30


def test_an_llm_that_overflows_is_refused(llama, tmp_path):
    with pytest.raises(UserError, match="numbers that are not finite"):
        load(changed(llama, tmp_path / "bad", overflowing))


@pytest.fixture
def checkpoint(tmp_path, setting) -> Path:
    state = {"trained_on": {}, "step": 3, "metrics": {}}
    return save_distiller(tmp_path / "run", setting.distiller, setting.llm, **state) / "best.safetensors"


def rewrite(path: Path, change) -> Path:
    """Pass a checkpoint's (tensors, state) through `change`; write it back."""
    tensors, state = load_checkpoint(path)
    change(tensors, state)
    save_file(tensors, path, metadata={"state": json.dumps(state)})
    return path


def test_a_distiller_with_a_weight_that_is_no_number_is_refused_by_its_name(checkpoint, setting):
    rewrite(checkpoint, lambda tensors, _: tensors["distiller.placeholders"][0].fill_(float("inf")))
    with pytest.raises(UserError, match="not finite, in distiller.placeholders"):
        load_distiller(checkpoint, setting.llm)


def test_a_score_that_is_no_number_names_method_task_and_seed(flags, setting, checkpoint, tmp_path,
                                                              monkeypatch):
    out = tmp_path / "results.jsonl"
    monkeypatch.setattr("score.head_logits", lambda llm, states: torch.full((len(states), 383), float("nan")))
    argv = [f for f in flags if f not in ("--distiller", "layers:2")]
    with pytest.raises(UserError, match="icl on ag_news, seed 13: the log-likelihood of an answer option"):
        evaluate.main([*argv, "--k", "4", "--methods", "icl", "--seeds", "13", "--limit", "4", "--out",
                       str(out)])
    assert not out.exists() or out.read_text() == ""


@pytest.mark.parametrize("flag", ["--lr", "--clip", "--warmup"])
@pytest.mark.parametrize("value", ["inf", "nan", "-1"])
def test_rates_are_finite(script, argv, flag, value):
    with pytest.raises(UserError, match=f"{flag} is {value}"):
        script.main([*argv, flag, value])


@pytest.mark.parametrize("flags", [["--seed", str(10 ** 30)], ["--seed", "-1"], ["--lam", "inf"],
                                   ["--pred-weight", "nan"], ["--max-minutes", "nan"]])
def test_numbers_of_absurd_size_are_refused(finetuning, flags):
    with pytest.raises(UserError, match=f"{flags[0]} is"):
        train_finetune.main([*finetuning, *flags])


def spoil_gradient(monkeypatch, step: int) -> None:
    """One NaN in the gradients of a step, whose loss is a number."""
    backward = run.Run.backward

    def bad(own, loss, **losses):
        backward(own, loss, **losses)
        if own.step == step:
            next(p for p in own.distiller.parameters() if p.grad is not None).grad.view(-1)[0] = float("nan")
    monkeypatch.setattr(run.Run, "backward", bad)


def test_a_gradient_that_is_no_number_changes_nothing_and_a_lower_rate_goes_on(script, argv, quick_dev,
                                                                               tmp_path, monkeypatch, capsys):
    folder, argv = tmp_path / "run", [*argv, "--save-every", "1"]
    with monkeypatch.context() as patch:
        spoil_gradient(patch, 2)
        with pytest.raises(UserError, match="the gradient's norm at step 2 is nan.*--resume goes on"):
            train(script, argv, folder)
    assert state_of(folder)["step"] == 2 and list(metrics(folder, "grad_norm")) == [1, 2]
    assert all(t.isfinite().all() for t in load_checkpoint(folder / "last.safetensors")[0].values())
    assert train(script, argv, folder, "--resume", "--lr", "1e-4")["steps"] == 4
    note = "--lr was 0.001 and is 0.0001 from step 2 on"
    assert note in capsys.readouterr().out and note in state_of(folder)["notes"][0]


def test_an_evaluation_that_is_no_number_is_never_best(script, argv, tmp_path, monkeypatch):
    stub_dev(monkeypatch, script, [float("nan")])
    with pytest.raises(UserError, match="the dev_option_ce at step 0 is nan"):
        train(script, argv, tmp_path / "run")
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_weights_that_an_update_spoils_are_not_saved(pretraining, quick_dev, tmp_path, monkeypatch):
    step = torch.optim.AdamW.step

    def huge(optimizer, *a, **kw):
        step(optimizer, *a, **kw)
        if run.lr_at(2, 4, 0.05, 1e-3) == optimizer.param_groups[0]["lr"]:
            with torch.no_grad():
                optimizer.param_groups[0]["params"][0].fill_(float("inf"))
    monkeypatch.setattr(torch.optim.AdamW, "step", huge)
    with pytest.raises(UserError, match="the sum of .* at step 3 is"):
        train(train_pretrain, pretraining, tmp_path / "run", "--save-every", "1", "--eval-every", "4")
    assert state_of(tmp_path / "run")["step"] == 2


# Whose weights


def same_name(llama: Path, folder: Path) -> Path:
    """Other weights under the same folder name."""
    return changed(llama, folder / llama.name, spoil(0.5))


def test_other_weights_of_the_same_name_are_another_llm(llama, tmp_path, setting, checkpoint):
    other = load(same_name(llama, tmp_path))
    assert loading.identity(other)["name"] == loading.identity(setting.llm)["name"] == llama.name
    with pytest.raises(UserError, match="was trained for the LLM .*vectors speak to one LLM only"):
        load_distiller(checkpoint, other)


def test_another_tokenizer_is_another_llm(llama, tmp_path, checkpoint):
    other = shutil.copytree(llama, tmp_path / llama.name)
    spec = json.loads((other / "tokenizer.json").read_text())
    vocab = spec["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match="vectors speak to one LLM only"):
        load_distiller(checkpoint, load(other))


def test_results_of_other_weights_are_not_taken_for_these(flags, llama, tmp_path, capsys):
    out = tmp_path / "results.jsonl"
    argv = [f for f in flags if f not in ("--distiller", "layers:2")]
    argv += ["--k", "4", "--methods", "icl", "--seeds", "13", "--limit", "4", "--out", str(out)]
    evaluate.main(argv)
    first = read_lines(out)
    evaluate.main([*argv, "--llm", str(same_name(llama, tmp_path))])
    lines = read_lines(out)
    assert lines[:2] == first and len(lines) == 4
    assert len({line["llm_hash"] for line in lines}) == 2 and len({line["llm"] for line in lines}) == 1


def test_what_is_older_than_the_hashes_is_read_with_a_note(flags, setting, checkpoint, tmp_path, capsys):
    def age(_, state):
        for name in ("weights_hash", "tokenizer_hash"):
            del state["model"]["llm"][name]
    load_distiller(rewrite(checkpoint, age), setting.llm)
    assert "names its LLM without hashes" in capsys.readouterr().out
    out = tmp_path / "results.jsonl"
    argv = [f for f in flags if f not in ("--distiller", "layers:2")]
    argv += ["--k", "4", "--methods", "icl", "--seeds", "13", "--limit", "4", "--out", str(out)]
    evaluate.main(argv)
    write_lines(out, [{k: v for k, v in line.items() if k != "llm_hash"} for line in read_lines(out)])
    before = out.read_bytes()
    evaluate.main(argv)
    assert out.read_bytes() == before  # taken for this LLM's, and nothing evaluated again


def test_a_hash_sees_any_byte_of_a_small_file_and_names(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(bytes(5000))
    one = files.content_hash([path])
    path.write_bytes(bytes(4000) + b"\1" + bytes(999))
    assert files.content_hash([path]) != one
    large = tmp_path / "large"
    large.write_bytes(bytes(17 << 20))
    one = files.content_hash([large])
    with large.open("r+b") as file:
        file.seek(5 << 18)
        file.write(b"\1")
    assert files.content_hash([large]) != one


# Tasks


def own_tasks(tasks_dir: Path, folder: Path, change) -> Path:
    """A copy of the tasks; each test file of emo goes through change(examples)."""
    shutil.copytree(tasks_dir, folder)
    for path in (folder / "emo").glob("*_test.jsonl"):
        write_lines(path, change(read_lines(path)))
    return folder


@pytest.mark.parametrize("change, message", [
    (lambda rows: rows[:2] + [rows[2] | {"options": "happy"}], r"_test.jsonl, line 3: .*options are a str"),
    (lambda rows: rows[:1] + [rows[1] | {"options": {"happy": 1}}], r"_test.jsonl, line 2: .*are a dict"),
    (lambda rows: [], r"_test.jsonl is empty"),
    (lambda rows: rows[:3] + [rows[3] | {"options": [*rows[3]["options"], "\ud800"]}], r", line 4"),
])
def test_a_broken_test_file_is_named_with_its_line(flags, tasks_dir, tmp_path, change, message):
    argv = [f for f in flags if f not in ("--distiller", "layers:2")]
    argv += ["--tasks", str(own_tasks(tasks_dir, tmp_path / "tasks", change)), "--k", "4", "--methods", "icl",
             "--seeds", "13", "--only", "emo", "--out", str(tmp_path / "r.jsonl")]
    with pytest.raises(UserError, match=message):
        evaluate.main(argv)


def test_options_that_the_llm_cannot_tell_apart_are_named_with_their_line(tasks_dir, tmp_path, tiny_tasks):
    path = tmp_path / "t.jsonl"
    row = read_lines(tasks_dir / "emo" / "emo_16_13_test.jsonl")[0]
    write_lines(path, [row, row | {"options": [*row["options"], row["options"][0]]}, row])
    ids_of = {"happy": [1], "sad": [2], "strange": [3]}
    require_options(read_examples(path), ids_of.get)  # the same text twice is one answer
    for ids, message in (({"sad": [1]}, "'happy' and 'sad' become the same tokens"),
                         ({"sad": []}, "'sad' becomes no token")):
        with pytest.raises(UserError, match=f"t.jsonl, line 1, task emo: .*{message}"):
            require_options(read_examples(path), (ids_of | ids).get)


def test_changed_task_data_are_not_gone_on_with(finetuning, quick_dev, tasks_dir, tmp_path):
    tasks = own_tasks(tasks_dir, tmp_path / "tasks", lambda rows: rows)
    argv = [*finetuning, "--tasks", str(tasks), "--steps", "1"]
    train(train_finetune, argv, tmp_path / "run")
    for name, kind in (("trec/trec_16384_100_train", "hash"), ("emo/emo_16_100_dev", "dev_hash")):
        path = tasks / f"{name}.jsonl"
        whole = path.read_text()
        path.write_text(whole.replace("the ", "a ", 1))
        with pytest.raises(UserError, match=f"was trained with finetune {kind} "):
            train(train_finetune, argv, tmp_path / "run", "--resume")
        path.write_text(whole)
    train(train_finetune, argv, tmp_path / "run", "--resume")
    last = tmp_path / "run" / "last.safetensors"

    def age(_, state):
        for name in ("hash", "dev_hash"):
            del state["trained_on"]["finetune"][name]
    rewrite(last, age)
    assert train(train_finetune, argv, tmp_path / "run", "--resume")["steps"] == 1
    assert common.OUT.exists() is False


# Files


FOREIGN = {"notes.txt": "my notes\nof a year\n", "one line.txt": "my notes", "list.jsonl": "[1]\n",
           "pretty.json": '{\n  "a": 1\n}\n', "metrics.jsonl": '{"step": 1, "kl": 0.5}\n',
           "table1.jsonl": '{"split": "class_to_class", "train": {}}\n', "binary": "\0\1\2"}


@pytest.fixture
def evaluating(flags) -> list[str]:
    """evaluate.py on four queries of two tasks."""
    flags = [f for f in flags if f not in ("--distiller", "layers:2")]
    return [*flags, "--k", "4", "--methods", "icl", "zero_shot", "--seeds", "13", "--limit", "4"]


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_that_holds_something_else_is_not_written_to(evaluating, tmp_path, name):
    path = tmp_path / name
    path.write_text(FOREIGN[name])
    with pytest.raises(UserError, match="is not a results file of evaluate.py"):
        evaluate.main([*evaluating, "--out", str(path)])
    assert path.read_text() == FOREIGN[name]


@pytest.mark.parametrize("place, fault", [
    ("/dev/full", "is no plain file"), ("/dev/null", "is no plain file"), ("FOLDER", "is a folder"),
    ("FILE/x", "stands under a file"), ("a" * 250, "too long a name"), ("/proc/x", "cannot be|must not")])
def test_places_that_cannot_be_written_to_are_refused(script, argv, evaluating, tmp_path, place, fault):
    (tmp_path / "FILE").write_text("x")
    (tmp_path / "FOLDER").mkdir()
    place = str(tmp_path / place)
    if "proc" not in place:
        with pytest.raises(UserError, match=f"--out .*{fault}"):
            evaluate.main([*evaluating, "--out", place])
    if "FOLDER" not in place and "null" not in place:
        with pytest.raises((UserError, OSError)):
            script.main([*argv, "--out-dir", place])
    assert Path("/dev/full").is_char_device() and (tmp_path / "FILE").read_text() == "x"


def test_a_line_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "lines.jsonl"
    files.append(path, {"a": 1})
    for cut, kept in (('{"a": 2', 1), ('{"a": 2}', 2)):
        path.write_text('{"a": 1}\n' + cut)
        files.append(path, {"a": 3})
        assert [line["a"] for line in read_lines(path)] == [1, 2, 3][:kept] + [3] * (kept < 3)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(UserError, match="No space left.*give the same command again"):
            files.append(path, {"a": 4})
    assert path.read_bytes() == before
    with pytest.raises(UserError, match="kl not finite"):
        files.append(path, {"kl": float("nan")})
    path.write_text("my notes")
    with pytest.raises(UserError, match="its last line is no JSON"):
        files.append(path, {"a": 1})
    assert path.read_text() == "my notes"


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("moment", ["os.replace", "os.fsync", "pathlib.Path.write_bytes"])
def test_a_file_is_the_old_one_or_the_new_one(tmp_path, monkeypatch, fault, moment):
    path = tmp_path / "file"
    files.write_whole(path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(moment, lambda *_: (_ for _ in ()).throw(fault))
        with pytest.raises((UserError, KeyboardInterrupt)):
            files.write_whole(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]
    link = tmp_path / "link"
    link.symlink_to(path)
    files.write_whole(link, "new")
    assert link.is_symlink() and path.read_text() == "new"


def test_a_checkpoint_has_the_mode_that_the_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_tensors(tmp_path / "t.safetensors", {"a": torch.ones(1)}, {})
    finally:
        os.umask(before)
    assert (tmp_path / "t.safetensors").stat().st_mode & 0o777 == 0o640


def test_nothing_else_opens_a_file_for_writing():
    """But for what fills a folder that appears by a rename, and the kernel's own files."""
    writes = re.compile(r"""open\([^)]*["'][wax]|write_text|write_bytes|savefig\((?!png|svg)|np\.save|"""
                        r"""save_file|os\.replace|\.rename\(""")
    allowed = {"sources/files.py", "sources/bigbench.py", "sources/assets.py", "sources/tasks.py"}
    found = {f"{path.relative_to(common.ROOT)}: {line.strip()}"
             for folder in (".", "sources", "paper") for path in (common.ROOT / folder).glob("*.py")
             if str(path.relative_to(common.ROOT)) not in allowed
             for line in path.read_text().splitlines() if writes.search(line) and "/proc/" not in line}
    assert found == {
        'sources/text.py: with whole(folder / "tokens.bin") as temporary, temporary.open("wb") as file:'}


def test_what_killed_writers_left_is_cleared_away_and_nothing_else(pretraining, quick_dev, tmp_path):
    folder = tmp_path / "run"
    train(train_pretrain, [*pretraining, "--steps", "1"], folder)
    (folder / ".last.safetensors.12345.a-machine.mend.tmp").write_bytes(bytes(100))
    for name in ("notes.tmp", "last.tmp", ".mine.tmp", "a.mend.tmp", ".last.safetensors.x.mend.tmp"):
        (folder / name).write_text("mine")
    train(train_pretrain, [*pretraining, "--steps", "2"], folder, "--resume")
    left = {p.name for p in folder.iterdir()} - {"last.safetensors", "best.safetensors", "metrics.jsonl",
                                                 ".mend.lock"}
    assert left == {"notes.tmp", "last.tmp", ".mine.tmp", "a.mend.tmp", ".last.safetensors.x.mend.tmp"}


def test_what_other_ranks_are_writing_stays(tmp_path, monkeypatch):
    """Of a rank on another machine no number says whether it lives; of this one a dead writer's goes."""
    monkeypatch.setenv("RANK", "0")
    alive, dead = os.getpid(), 2 ** 22 + 1  # Linux gives no process this number
    names = {(n, host): f".tokens.bin.{n}.{host}.mend.tmp" for n in (alive, dead) for host in (HOST, "other")}
    for name in names.values():
        (tmp_path / name).write_bytes(b"")
    with held(tmp_path, "--out-dir"):
        left = {path.name for path in tmp_path.iterdir()} - {".mend.lock"}
    assert left == {*names.values()} - {names[dead, HOST]}


def test_lines_of_another_kind_in_the_log_stay(pretraining, quick_dev, tmp_path):
    folder = tmp_path / "run"
    train(train_pretrain, [*pretraining, "--steps", "1"], folder)
    foreign = ["a note\n", "[1, 2]\n", '{"comment": "mine"}\n', '{"step": "later"}\n']
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines([*foreign, '{"step": 9, "kl": 1.0}\n', '{"step": 9, "k'])
    train(train_pretrain, [*pretraining, "--steps", "2"], folder, "--resume")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert [line for line in lines if line in foreign] == foreign
    steps = [json.loads(line)["step"] for line in lines if line not in foreign]
    assert steps == [0, 1, 1, 2, 2]


@pytest.mark.parametrize("damage", ["truncated", "zeroed", "ends", "no hash"])
def test_a_damaged_cache_of_the_corpus_is_made_again(corpus_dir, tokenizer, damage):
    def corpus():
        return Corpus([str(corpus_dir)], tokenizer, 96, 8)
    whole = corpus()
    folder = next(common.CACHE.glob("corpus-*"))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    rows = whole.training_rows(1, 0, 9, 0.8)
    del whole
    name = {"ends": "ends.bin", "no hash": "about.json"}.get(damage, "tokens.bin")
    content = before[name]
    (folder / name).write_bytes({"truncated": content[:-8], "zeroed": bytes(len(content)),
                                 "ends": content[8:], "no hash": b"{}"}[damage])
    assert corpus().training_rows(1, 0, 9, 0.8) == rows
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("name, split", [
    ("../../x", "test"), ("/tmp/x", "test"), ("a/b", "test"), ("", "test"), ("..", "test"), (None, "test"),
    ("unifiedqa:ropes", "../../../x")])
def test_a_task_of_the_hub_cannot_leave_the_cache(monkeypatch, tmp_path, name, split):
    row = {"task": name, "input": "x", "output": "y", "options": [], "seed": "13", "split": split}
    monkeypatch.setattr(sources.tasks, "hub_rows", lambda *a, **kw: iter([row]))
    before = set(tmp_path.iterdir()) | {common.CACHE}
    with pytest.raises(UserError, match="no plain names; nothing was kept"):
        sources.tasks.hub_tasks()
    assert set(tmp_path.iterdir()) == before and not list(common.CACHE.glob("metaicl*"))
    assert not list(common.CACHE.rglob("*.jsonl"))


def test_an_asset_that_lacks_a_file_does_not_appear(tmp_path, monkeypatch):
    monkeypatch.setattr(assets, "fetch", lambda pin, folder: folder / "x")

    def convert(archives, out, args):
        (out / "a.txt").write_text("text")
        (out / "b.txt").write_text("")  # what a full disk leaves
        return {"speeches": 2, "files": 2}
    monkeypatch.setitem(assets.TARGETS, "corpus", (*assets.TARGETS["corpus"][:2], convert))
    with pytest.raises(ValueError, match="got 1 files, expected 2"):
        assets.build("corpus", {"sotu": {}}, SimpleNamespace(dir=str(tmp_path)))
    assert not (tmp_path / "sotu").exists()


# Two at once, and signals


@pytest.fixture
def other_process():
    """Another process that holds the lock of a place."""
    running = []

    def hold(lock: Path) -> None:
        lock.parent.mkdir(parents=True, exist_ok=True)
        code = (f"import filelock, sys; lock = filelock.FileLock({str(lock)!r}); lock.acquire(); "
                "print('held', flush=True); sys.stdin.read()")
        process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, text=True)
        running.append(process)
        assert process.stdout.readline() == "held\n"
    yield hold
    for process in running:
        process.kill()
        process.communicate()


def test_a_run_folder_is_one_processs(script, argv, quick_dev, tmp_path, other_process):
    other_process(tmp_path / "run" / ".mend.lock")
    with pytest.raises(UserError, match="another process is writing to --out-dir .*run; wait for its end"):
        train(script, argv, tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == [".mend.lock"]


def test_a_results_file_is_one_processs(evaluating, tmp_path, other_process):
    other_process(tmp_path / ".r.jsonl.mend.lock")
    with pytest.raises(UserError, match="another process is writing to --out .*r.jsonl"):
        evaluate.main([*evaluating, "--out", str(tmp_path / "r.jsonl")])
    assert not (tmp_path / "r.jsonl").exists()


def signal_in_step(monkeypatch, number: int, step: int) -> None:
    backward = run.Run.backward

    def interrupted(own, loss, **losses):
        if own.step == step and not own.stop.code:
            os.kill(os.getpid(), number)
        backward(own, loss, **losses)
    monkeypatch.setattr(run.Run, "backward", interrupted)


@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129)])
def test_a_signal_ends_a_training_behind_its_step_saved(finetuning, tmp_path, monkeypatch, capfd, request,
                                                        name, code):

    number = getattr(signal, name)
    usual = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
    ignored = signal.signal(number, usual)  # as a job behind a shell's & ignores SIGINT, and so would the run
    request.addfinalizer(lambda: signal.signal(number, ignored))
    argv, whole, cut = [*finetuning, "--save-every", "9"], tmp_path / "whole", tmp_path / "cut"
    train(train_finetune, argv, whole)
    with monkeypatch.context() as patch:
        signal_in_step(patch, number, 2)
        patch.setattr("sys.argv", ["train_finetune.py", "--tasks", "a folder"])
        with pytest.raises(SystemExit) as stop:
            train(train_finetune, argv, cut)
    said = capfd.readouterr()
    assert stop.value.code == code and name in said.err and signal.getsignal(number) == usual
    assert "saved after step 3 of 4; go on with" in said.out
    assert "\npython train_finetune.py --tasks 'a folder' --resume\n" in said.out
    assert state_of(cut)["step"] == 3
    train(train_finetune, argv, cut, "--resume")
    assert_same(whole, cut)
    assert metrics(cut, "kl") == metrics(whole, "kl")


def test_what_nohup_ignores_stays_ignored(pretraining, quick_dev, tmp_path, monkeypatch):

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signal_in_step(monkeypatch, signal.SIGHUP, 1)
        assert train(train_pretrain, pretraining, tmp_path / "run")["steps"] == 4
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_each_call_of_a_run_without_time_makes_a_step(script, argv, quick_dev, tmp_path, capsys):
    folder = tmp_path / "run"
    for step in (1, 2, 3, 4):
        with pytest.raises(SystemExit) as stop:
            train(script, [*argv, "--save-every", "9"], folder, "--max-minutes", "0", "--resume")
        assert stop.value.code == 124 and state_of(folder)["step"] == step
    assert train(script, argv, folder, "--max-minutes", "0", "--resume")["steps"] == 4


def test_a_signal_ends_an_evaluation_behind_its_set(evaluating, tmp_path, monkeypatch):
    one, cut = (str(tmp_path / name) for name in ("whole.jsonl", "cut.jsonl"))
    evaluate.main([*evaluating, "--out", one])
    evaluate_one = evaluate.evaluate_one
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "evaluate_one",
                      lambda *a, **kw: (os.kill(os.getpid(), signal.SIGTERM), evaluate_one(*a, **kw))[1])
        with pytest.raises(SystemExit) as stop:
            evaluate.main([*evaluating, "--out", cut])
    assert stop.value.code == 143 and len(read_lines(Path(cut))) == 1
    evaluate.main([*evaluating, "--out", cut])
    assert read_lines(Path(cut)) == read_lines(Path(one)) and len(read_lines(Path(one))) == 4


# Headers and configurations that anybody may have written


def with_config(llama: Path, folder: Path, **changes) -> str:
    folder = shutil.copytree(llama, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return str(folder)


@pytest.mark.parametrize("changes, message", [
    ({"num_hidden_layers": 10 ** 9}, "a configuration of 1000000000 layers"),
    ({"num_hidden_layers": 1e9}, "cannot be loaded"), ({"num_hidden_layers": -1}, "of -1 layers"),
    ({"hidden_size": 10 ** 9}, "cannot be loaded"), ({"vocab_size": 10 ** 12}, "cannot be loaded"),
    ({"num_attention_heads": 0}, "cannot be loaded"), ({"model_type": "nope"}, "cannot be loaded"),
    ({"model_type": "nope", "auto_map": {"AutoConfig": "evil.Config"}}, "cannot be loaded"),
    ({"attn_implementation": "some/kernel"}, "attn_implementation some/kernel; take that out"),
    ({"dtype": "zz"}, "cannot be loaded"), ({"hidden_act": "zz"}, "cannot be loaded")])
def test_hostile_configurations_of_llm_and_sibling_are_refused(llama, llama_llm, tmp_path, changes, message):
    name = with_config(llama, tmp_path / "bad", **changes)
    with pytest.raises(UserError, match=f"--llm .*{message}"):
        load_llm(name, torch.device("cpu"), torch.float32)
    with pytest.raises(UserError, match=f"--distiller .*{message}"):
        loading.build_distiller(name, llama_llm, 4, "matched", 0)


def test_no_loader_trusts_code_from_elsewhere():
    calls = re.compile(r"\.from_pretrained\((?:[^()]|\([^()]*\))*\)", re.DOTALL)
    texts = {path: path.read_text() for folder in (".", "sources", "serving", "paper")
             for path in (common.ROOT / folder).glob("*.py")}
    # serving/ has a from_pretrained of its own, which runs no code of the folder's
    found = [call for path, text in texts.items() if path.parent.name != "serving"
             for call in calls.findall(text)]
    assert len(found) >= 9
    assert [c for c in found if "trust_remote_code=False" not in c and "**local" not in c] == []
    assert not any(re.search(r"trust_remote_code\s*=\s*(?!False)", text) for text in texts.values())


@pytest.mark.parametrize("field, value, message", [
    ("distill_len", 10 ** 6, "the file has 4 vectors"), ("distiller", "kv:1000000000", "has"),
    ("distiller", "free", "has"), ("vector_start", "x", "expected one of plain"),
    ("template", "x", "expected one of space"),
    ("backbone", {"num_hidden_layers": 10 ** 9}, "num_hidden_layers 1000000000"),
    ("backbone", {"hidden_size": 64}, "other tensors than its header says"),
    ("backbone", {"intermediate_size": 10 ** 7}, "other tensors than its header says"),
    ("backbone", {"vocab_size": 10 ** 7}, "vocab_size 10000000"),
    ("backbone", {"attn_implementation": "some/kernel"}, "would load code or kernels: attn_implementation"),
    ("backbone", {"auto_map": {"AutoModel": "x.Y"}}, "would load code or kernels: auto_map"),
    ("backbone", {"model_type": "nope"}, "no distiller can be built from")])
def test_headers_that_ask_for_more_than_their_tensors_are_refused(checkpoint, setting, field, value, message):
    def change(_, state):
        new = state["model"][field] | value if isinstance(value, dict) else value
        state["model"][field] = new
    with pytest.raises(UserError, match=message):
        load_distiller(rewrite(checkpoint, change), setting.llm)


def test_a_broken_last_checkpoint_is_an_error_of_resume(finetuning, quick_dev, tmp_path):
    argv = [*finetuning, "--steps", "1", "--save-every", "1"]
    train(train_finetune, argv, tmp_path / "run")
    last = tmp_path / "run" / "last.safetensors"
    before = last.read_bytes()
    moment = next(name for name in load_checkpoint(last)[0] if name.endswith("exp_avg"))
    for change in (lambda t, s: s.pop("flags"), lambda t, s: s.update(best="x"),
                   lambda t, s: s.update(step=-1), lambda t, s: s["model"].pop("llm"),
                   lambda t, s: t.update({moment: torch.ones(2)}), lambda t, s: s.update(evaluated=None),
                   lambda t, s: t.pop("distiller.placeholders")):
        last.write_bytes(before)
        rewrite(last, change)
        with pytest.raises(UserError, match="last.safetensors"):
            train(train_finetune, argv, tmp_path / "run", "--resume")


def test_broken_neighbours_are_left_out_with_a_note(finetuning, setting, tmp_path, capsys):
    flags = {"distiller": "layers:2", "distill_len": 4, "vector_start": "matched", "template": "space"}
    stage = {"trained_on": {"pretrain": {"objective": "kl", "beta": 0.8}}, "metrics": {"recovered": 0.5}}
    save_distiller(common.OUT / "good", setting.distiller, setting.llm, **stage)
    for name, change in {"nan": {"metrics": {"recovered": "x"}}, "less": {"metrics": {}},
                         "list": {"trained_on": {"pretrain": []}}}.items():
        save_distiller(common.OUT / name, setting.distiller, setting.llm, **stage | change)
    (common.OUT / "cut").mkdir()
    (common.OUT / "cut" / "best.safetensors").write_bytes(b"cut")
    args = SimpleNamespace(**flags)
    assert train_finetune.find_pretrained(setting.llm, args) == common.OUT / "good" / "best.safetensors"
    said = capsys.readouterr().out
    assert [name for name in ("nan", "less", "list", "cut", "good") if f"out/{name}/" in said] == [
        "nan", "less", "list", "cut"]


@pytest.mark.parametrize("script", [train_pretrain, train_finetune], indirect=True)
def test_more_vectors_than_the_llm_reads_are_refused_at_once(script, argv):
    with pytest.raises(UserError, match="--distill-len is 100000"):
        script.main([*argv, "--distill-len", "100000"])


@pytest.fixture
def demos_file(tmp_path) -> str:
    return write_lines(tmp_path / "demos.jsonl", [{"input": "the river is cold", "output": "sad"},
                                                  {"input": "music and bread", "output": "happy"}])


def test_answer_tokens_have_room_behind_learned_positions(gpt2, tmp_path, demos_file):
    llm = load(gpt2)
    folder = save_distiller(tmp_path / "run", make_distiller(llm), llm, trained_on={})
    argv = ["--llm", str(gpt2), "--checkpoint", str(folder), "--device", "cpu", "--dtype", "fp32", "--demos",
            demos_file, "--ask", "boat " * 300]
    assert len(distill.main([*argv, "--answer-tokens", "300"])["answers"]["mend"]) == 1
    with pytest.raises(UserError, match="--answer-tokens 381: the LLM's 640 positions leave 3"):
        distill.main([*argv, "--answer-tokens", "381"])


def test_texts_and_names_that_are_no_utf8(setting, llama, checkpoint, demos_file, tmp_path, capfd):
    argv = ["--llm", str(llama), "--checkpoint", str(checkpoint), "--device", "cpu", "--dtype", "fp32"]
    with pytest.raises(UserError, match="--ask holds a text that is not UTF-8"):
        distill.main([*argv, "--demos", demos_file, "--ask", "a\udcff"])
    write_lines(tmp_path / "d.jsonl", [{"input": "a \ud800", "output": "b"}])
    with pytest.raises(UserError, match="d.jsonl, line 1"):
        distill.main([*argv, "--demos", str(tmp_path / "d.jsonl"), "--ask", "x"])
    odd = os.fsdecode(bytes(tmp_path) + b"/odd\xff.jsonl")
    with pytest.raises(SystemExit) as stop:
        common.run_main(lambda: distill.main([*argv, "--demos", odd, "--ask", "x"]))
    assert stop.value.code == 2 and "odd" in capfd.readouterr().err


def test_a_header_that_was_changed_is_an_error(checkpoint, setting, tmp_path):
    save_vectors(str(tmp_path / "v"), torch.ones(4, 32), {"llm": loading.identity(setting.llm),
                                                                  "template": "space", "labels": ["sad"]})
    read_vectors(str(tmp_path / "v"), setting.llm)
    for path, old, new in ((checkpoint, b"1e-06", b"1e-01"), (tmp_path / "v", b"space", b"SPACE")):
        content = path.read_bytes()
        assert content.count(old) == 1
        path.write_bytes(content.replace(old, new))
        with pytest.raises(UserError, match="its header was changed"):
            load_checkpoint(path) if path is checkpoint else read_vectors(str(path), setting.llm)


# Many processes


RANKS = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
import torch, common, evaluate
torch.set_num_threads(1)
common.CACHE, common.OUT = Path({folder!r}) / "cache", Path({folder!r}) / "out"
common.run_main(evaluate.main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_evaluate_like_one_process(evaluating, checkpoint, tmp_path, ranks):
    """Twelve results, of which five are there, uneven for three ranks; one line is cut."""
    argv = [*evaluating, "--methods", "zero_shot", "majority", "icl", "--checkpoint", str(checkpoint.parent),
            "--distill-len", "4", "--seeds", "13", "21"]
    one, many, driver = tmp_path / "one.jsonl", tmp_path / "many.jsonl", tmp_path / "driver.py"
    evaluate.main([*argv, "--out", str(one)])
    lines = one.read_text().splitlines(keepends=True)
    many.write_text("".join(lines[:5]) + lines[5][:20])  # a kill has cut the sixth
    driver.write_text(RANKS.format(root=str(common.ROOT), folder=str(tmp_path)))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks),
                           "--master_addr", "127.0.0.1", "--master_port", str(29600 + ranks), str(driver),
                           *argv, "--out", str(many)], check=True, timeout=300, text=True,
                          capture_output=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"})
    assert read_lines(many) == read_lines(one) and len(lines) == 12
    assert done.stdout.count("headline") == 2  # rank 0 alone prints


def test_another_number_of_ranks_is_refused(finetuning, quick_dev, tmp_path):
    train(train_finetune, [*finetuning, "--steps", "1"], tmp_path / "run")
    rewrite(tmp_path / "run" / "last.safetensors", lambda _, state: state.update(ranks=2))
    with pytest.raises(UserError, match=r"was trained with ranks 2 \(now 1\)"):
        train(train_finetune, [*finetuning, "--steps", "2"], tmp_path / "run", "--resume")


def test_trainings_end_with_the_script_that_began_them(tmp_path):
    """gpu.sh, with something in python's place that says who it is and waits."""
    stub, pids = tmp_path / "python", tmp_path / "pids"
    stub.write_text(f"#!/bin/bash\necho $$ >> {pids}\nexec sleep 100\n")
    stub.chmod(0o755)
    env = os.environ | {"PYTHON": str(stub), "RUNS": str(tmp_path / "runs"), "RESULTS": str(tmp_path / "r")}
    script = subprocess.Popen(["bash", str(common.ROOT / "paper" / "runs" / "gpu.sh")], env=env)
    deadline = time.time() + 20
    while (not pids.exists() or len(pids.read_text().split()) < 3) and time.time() < deadline:
        time.sleep(0.02)
    children = [int(pid) for pid in pids.read_text().split()]
    script.terminate()
    assert script.wait(20) == 143 and len(children) == 3
    while any(map(files.is_alive, children)) and time.time() < deadline:
        time.sleep(0.02)
    assert [pid for pid in children if files.is_alive(pid)] == []


@pytest.mark.slow
def test_a_table_that_fails_leaves_the_old_file(tmp_path):
    (tmp_path / "table1-pocket.jsonl").write_text("old\n")
    env = os.environ | {"PYTHON": sys.executable, "SCALE": "pocket", "METAICL_DIR": str(tmp_path / "none"),
                        "RESULTS": str(tmp_path)}
    done = subprocess.run(["bash", str(common.ROOT / "paper" / "runs" / "table1.sh")], env=env, check=False,
                          capture_output=True, text=True)
    assert done.returncode != 0 and "none" in done.stderr
    assert (tmp_path / "table1-pocket.jsonl").read_text() == "old\n" and len(list(tmp_path.iterdir())) == 1
