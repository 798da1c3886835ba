"""Nothing lost, nothing false: faults of the numbers, of what is read, of the machine, and of two at once."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import load, read_lines, save_distiller, write_lines
from safetensors.torch import load_file, save_file
from training import metrics, state_of, train

import common
import evaluate
import loading
import run
import train_finetune
from common import UserError
from loading import load_checkpoint, load_distiller, load_llm
from sources import files

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
    state = {"trained_on": {}, "step": 3, "figures": {}}
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
    from training import stub_dev
    stub_dev(monkeypatch, script, [float("nan")])
    with pytest.raises(UserError, match="the val_option_ce at step 0 is nan"):
        train(script, argv, tmp_path / "run")
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_weights_that_an_update_spoils_are_not_saved(pretraining, quick_dev, tmp_path, monkeypatch):
    import train_pretrain
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
    from sources.tasks import read_examples, require_options
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
