"""Tests of run.py: learning rate, optimiser, checkpoints that a crash leaves whole, and runs of both stages
that
are stopped and go on."""

import copy
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from training import PROMPT_TUNING, assert_same, furthest, interrupt_after, metrics, state_of, stub_dev, train

import common
import loading
import run
import train_finetune
import train_pretrain
from common import UserError
from loading import load_checkpoint
from run import lr_at, save_checkpoint
from sources.headers import check_resumable

# Learning rate

def test_lr_at_by_hand():
    # 10 steps, warm-up of 0.4 * 10 = 4 steps, then 6 steps down to zero
    by_hand = [0.25, 0.5, 0.75, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0]
    assert [lr_at(step, 10, 0.4, 2.0) / 2 for step in range(11)] == pytest.approx(by_hand)


@pytest.mark.parametrize("steps, warmup", [(1, 0.0), (1, 1.0), (7, 0.0), (7, 1.0), (40, 0.05), (1000, 0.1)])
def test_lr_never_leaves_zero_to_peak_and_every_step_moves(steps, warmup):
    rates = [lr_at(step, steps, warmup, 3e-4) for step in range(steps)]
    assert max(rates) == pytest.approx(3e-4) and min(rates) > 0


def small(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(3, 2)


def test_checkpoint_holds_weights_moments_and_state(tmp_path):
    module = small(0)
    optimizer = run.make_optimizer(module, 0.1)
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    save_checkpoint(tmp_path / "run" / "last.safetensors", module, {"step": 3, "note": "é"}, optimizer)
    tensors, state = load_checkpoint(tmp_path / "run")
    assert state == {"step": 3, "note": "é"} == state_of(tmp_path / "run")
    expected = {f"distiller.{n}": t for n, t in module.state_dict().items()}
    expected |= {f"optimizer.{n}.{key}": optimizer.state[p][key] for n, p in module.named_parameters()
                 for key in ("step", "exp_avg", "exp_avg_sq")}
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], t) for name, t in expected.items())


def test_weight_decay_spares_vectors_and_frozen_weights():
    module = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3).requires_grad_(False))
    decay, none = run.make_optimizer(module, 0.1).param_groups
    assert decay["params"] == [module[0].weight] and decay["weight_decay"] == 0.01
    assert {id(p) for p in none["params"]} == {id(p) for p in (module[0].bias, *module[1].parameters())}
    assert none["weight_decay"] == 0


@pytest.mark.parametrize("moment", ["before writing", "half way", "before renaming"])
def test_a_crash_while_saving_leaves_the_old_checkpoint(tmp_path, monkeypatch, moment):
    path = tmp_path / "last.safetensors"
    save_checkpoint(path, small(0), {"step": 1})
    before = path.read_bytes()

    def crash(tensors, file, metadata=None):
        if moment == "half way":
            file.write_bytes(b"half a file")
        raise KeyboardInterrupt

    if moment == "before renaming":
        monkeypatch.setattr(common.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    else:
        monkeypatch.setattr("safetensors.torch.save_file", crash)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, small(1), {"step": 2})
    assert path.read_bytes() == before
    assert load_checkpoint(tmp_path)[1] == {"step": 1}


def test_a_folder_gives_its_best_else_its_last_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "last.safetensors", small(0), {"step": 2})
    assert load_checkpoint(tmp_path)[1] == {"step": 2}
    save_checkpoint(tmp_path / "best.safetensors", small(0), {"step": 1})
    assert load_checkpoint(tmp_path)[1] == {"step": 1}
    assert load_checkpoint(tmp_path / "last.safetensors")[1] == {"step": 2}
    name = loading.checkpoint_id(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert loading.checkpoint_id("best.safetensors") == name  # however its path is typed
    save_checkpoint(tmp_path / "best.safetensors", small(1), {"step": 1})
    assert name.startswith(f"{tmp_path.name}/best@") and loading.checkpoint_id(tmp_path) != name


@pytest.mark.parametrize("damage", ["cut", "not safetensors", "no state", "empty"])
def test_a_damaged_checkpoint_is_a_user_error(tmp_path, damage):
    from safetensors.torch import save_file
    path = tmp_path / "best.safetensors"
    save_checkpoint(path, small(0), {"step": 1})
    content = path.read_bytes()
    path.write_bytes({"cut": content[:-5], "not safetensors": b"{}" * 50, "empty": b"",
                      "no state": content}[damage])
    if damage == "no state":
        save_file({"a": torch.ones(1)}, path)
    with pytest.raises(UserError, match="is not a whole checkpoint"):
        load_checkpoint(path)


def test_a_missing_checkpoint_says_what_was_expected(tmp_path):
    with pytest.raises(UserError, match="no checkpoint at .*best.safetensors"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("script, family, more", [  # gpt2 has dropout, which must be drawn again alike
    (train_pretrain, "llama", []), (train_pretrain, "gpt2", []), (train_finetune, "llama", []),
    (train_finetune, "gpt2", []), (train_finetune, "llama", PROMPT_TUNING)], indirect=["script"])
def test_an_interrupted_run_equals_a_whole_one(script, argv, request, tmp_path, monkeypatch, family, more):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    argv = [*argv, "--llm", str(request.getfixturevalue(family)), "--save-every", "1", *more]
    train(script, argv, whole)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train(script, argv, cut)
    assert state_of(cut)["step"] == 2
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "k')  # a kill in the middle of a line
    final = train(script, argv, cut, "--resume")
    least = 4 if more else 21  # of free vectors, these and Adam's two moments and step
    assert_same(whole, cut, "last", least)
    assert_same(whole, cut, "best", least // 4)
    for key in ("kl", "pred", "grad_norm", "heldout_kl", "dev_kl", "dev_pred", "dev_headline"):
        assert metrics(cut, key) == metrics(whole, key)
    assert train(script, argv, cut, "--resume") == final  # nothing is left to do
    assert_same(whole, cut, "last", least)


@pytest.mark.parametrize("where", ["best.safetensors", "last.safetensors"])
def test_an_evaluation_cut_off_is_logged_once(pretraining, tmp_path, monkeypatch, where):
    stub_dev(monkeypatch, train_pretrain, [4.0, 3.0, 2.0, 1.0])
    argv, save = [*pretraining, "--save-every", "1"], run.save_checkpoint

    def crash(path, distiller, state, optimizer=None):
        if path.name == where and state["evaluated"] == 2:
            raise KeyboardInterrupt
        save(path, distiller, state, optimizer)
    with monkeypatch.context() as patch:
        patch.setattr(run, "save_checkpoint", crash)
        with pytest.raises(KeyboardInterrupt):
            train(train_pretrain, argv, tmp_path / "run")
    train(train_pretrain, argv, tmp_path / "run", "--resume")
    assert list(metrics(tmp_path / "run", "heldout_kl")) == [0, 2, 4]


@pytest.mark.parametrize("script, more, values, best_step", [
    (train_pretrain, [], [4.0, 3.0, 1.0, 2.0, 1.0], 2),
    (train_pretrain, ["--objective", "clm"], [9.0, 5.0, 2.0, 1.5, 3.0], 3),
    (train_pretrain, ["--objective", "clm+kl", "--gamma", "0.5"], [9.0, 5.0, 2.0, 1.5, 3.0], 3),
    (train_finetune, [], [5.0, 3.0, 1.0, 2.0, 4.0], 2), (train_finetune, [], [1.0, 3.0, 2.0, 2.0, 2.0], 0)],
    indirect=["script"])
def test_best_is_the_one_with_the_lowest_option_ce(script, argv, tmp_path, monkeypatch, more, values,
                                                          best_step):
    """Not the one with the lowest losses, which fall all the way; and it may be the start."""
    seen = []
    stub_dev(monkeypatch, script, values, seen)
    train(script, argv, tmp_path / "run", "--eval-every", "1", *more)
    best, state = load_checkpoint(tmp_path / "run")
    assert (state["step"], state["best"]) == (best_step, min(values))
    assert state["metrics"]["dev_option_ce"] == min(values)
    assert all(torch.equal(best[f"distiller.{name}"], t) for name, t in seen[best_step].items())
    assert not all(torch.equal(best[f"distiller.{name}"], t) for name, t in seen[best_step + 1].items())
    assert state_of(tmp_path / "run")["bad_evaluations"] == 4 - best_step


@pytest.mark.parametrize("patience, values, last_step, best_step", [
    ("1", [2.0, 3.0, 1.0, 1.0], 2, 1), ("2", [2.0, 3.0, 1.0, 4.0, 4.0, 0.5], 5, 3),
    ("0", [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 6, 1)])
def test_early_stopping(script, argv, tmp_path, monkeypatch, patience, values, last_step, best_step):
    stub_dev(monkeypatch, script, [9.0, *values])
    argv = [*argv, "--eval-every", "1", "--steps", "6", "--patience", patience]
    assert train(script, argv, tmp_path / "run")["steps"] == last_step
    assert state_of(tmp_path / "run", "best")["step"] == best_step
    assert train(script, argv, tmp_path / "run", "--resume")["steps"] == last_step  # stays stopped


def test_an_existing_run_needs_resume_and_its_own_flags(script, argv, quick_dev, tmp_path):
    argv, folder = [*argv, "--steps", "1"], tmp_path / "run"
    train(script, argv, folder)
    before = [(folder / name).read_bytes() for name in ("last.safetensors", "metrics.jsonl")]
    with pytest.raises(UserError, match="holds a run already; add --resume"):
        train(script, argv, folder)
    for change in (["--distill-len", "5"], ["--clip", "0.5"], ["--dtype", "bf16"], ["--llm-weights", "bf16"],
                   ["--min-doc-len", "9"] if script is train_pretrain else ["--lam", "0.5"]):
        with pytest.raises(UserError, match="give the flags of that run"):
            train(script, argv, folder, *change, "--resume")
    assert before == [(folder / name).read_bytes() for name in ("last.safetensors", "metrics.jsonl")]


def test_more_steps_on_resume_are_told(pretraining, quick_dev, tmp_path, capsys):
    train(train_pretrain, pretraining, tmp_path / "run", "--resume", "--steps", "1")
    assert "note: --steps" not in capsys.readouterr().out
    assert train(train_pretrain, pretraining, tmp_path / "run", "--resume", "--steps", "2")["steps"] == 2
    assert "note: --steps was 1 and is 2" in capsys.readouterr().out


@pytest.mark.parametrize("script, name, value", [
    (train_pretrain, "distill_loss", "nan"), (train_finetune, "pred_loss", "inf"),
    (train_finetune, "distill_loss", "inf")], indirect=["script"])
def test_a_loss_that_is_not_finite_stops(script, argv, quick_dev, tmp_path, monkeypatch, name, value):
    loss, calls = getattr(script, name), []

    def breaks(*a):
        calls.extend([1] * torch.is_grad_enabled())  # not in evaluation
        # the second micro-batch of the second step
        return loss(*a) * (float(value) if len(calls) == 4 else 1)
    monkeypatch.setattr(script, name, breaks)
    with pytest.raises(UserError, match=f"the loss at step 1 is {value}; lower --lr"):
        train(script, argv, tmp_path / "run", "--eval-every", "4", "--save-every", "1")
    tensors, state = load_checkpoint(tmp_path / "run" / "last.safetensors")
    assert state["step"] == 1 and all(t.isfinite().all() for t in tensors.values())


def test_two_micro_batches_equal_one_large_batch(script, argv, quick_dev, tmp_path):
    """At a small learning rate: Adam divides by the gradient's size, so it enlarges rounding near zero."""
    for name, size, accumulated in (("two", "2", "2"), ("one", "4", "1"), ("other", "3", "1")):
        train(script, argv, tmp_path / name, "--lr", "2e-4", "--batch-size", size, "--grad-accum",
              accumulated)
    two, one, other = (tmp_path / name for name in ("two", "one", "other"))
    assert furthest(two, one, "distiller.") < 1e-5 and furthest(two, one, ".exp_avg") < 1e-6
    assert furthest(other, one, "distiller.") > 1e-4 and furthest(other, one, ".exp_avg") > 1e-4


def test_learning_rate_rises_and_falls_over_all_steps(pretraining, quick_dev, tmp_path, monkeypatch):
    rates, end_step = [], run.Run.end_step
    monkeypatch.setattr(run.Run, "end_step", lambda run, n_tokens: (
        rates.append([group["lr"] for group in run.optimizer.param_groups]), end_step(run, n_tokens))[1])
    train(train_pretrain, pretraining, tmp_path / "run", "--steps", "6", "--warmup", "0.34", "--lr", "0.01",
          "--eval-every", "6")
    assert rates == [pytest.approx([0.01 * share] * 2) for share in (1 / 2, 1, 1, 3 / 4, 2 / 4, 1 / 4)]


@pytest.mark.parametrize("clip, bound", [("0.001", 0.001), ("0", None)])
def test_gradients_are_clipped_to_the_given_norm(pretraining, quick_dev, tmp_path, monkeypatch, clip, bound):
    norms, step = [], torch.optim.AdamW.step

    def record(optimizer, *a, **kw):
        gradients = [p.grad.norm() for group in optimizer.param_groups for p in group["params"]
                     if p.grad is not None]
        norms.append(torch.stack(gradients).norm().item())
        return step(optimizer, *a, **kw)
    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    train(train_pretrain, pretraining, tmp_path / "run", "--clip", clip, "--eval-every", "4")
    logged = list(metrics(tmp_path / "run", "grad_norm").values())  # as they were before clipping
    assert min(logged) > 0.001
    assert norms == pytest.approx([bound] * 4 if bound else logged, rel=1e-2 if bound else 1e-5)


def test_dropout_is_drawn_in_training_alone(pretraining, quick_dev, tmp_path, gpt2, monkeypatch):
    finals, seed = [], torch.manual_seed
    for shift in (0, 1):  # the same weights and data, other dropout
        monkeypatch.setattr(torch, "manual_seed", lambda s, shift=shift: seed(s + shift * (s > 1_000_000)))
        finals.append(train(train_pretrain, pretraining, tmp_path / str(shift), "--llm", str(gpt2), "--steps",
                            "1", "--lr", "1e-30"))
    assert finals[0]["heldout_kl"] == pytest.approx(finals[1]["heldout_kl"], rel=1e-6)
    assert metrics(tmp_path / "0", "kl")[1] != pytest.approx(metrics(tmp_path / "1", "kl")[1], rel=1e-6)


def test_batch_must_be_shared_evenly_by_the_ranks(pretraining, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="--batch-size 2 cannot be shared by 3 ranks"):
        train_pretrain.main(pretraining)


DRIVER = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
import torch, common, run, train_pretrain
torch.set_num_threads(1)
common.CACHE, common.OUT = Path({folder!r}) / "cache", Path({folder!r}) / "out"
begin = run.Run.begin_step
run.Run.begin_step = lambda own: (time.sleep({pause}), begin(own))
common.run_main(train_pretrain.main)
"""


def driver(folder: Path, pause: float = 0.0) -> str:
    """A script that runs train_pretrain.py with its cache in `folder`, resting before each step."""
    path = folder / "driver.py"
    path.write_text(DRIVER.format(root=str(common.ROOT), folder=str(folder), pause=pause))
    return str(path)


ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


@pytest.mark.slow
def test_two_processes_train_like_one(pretraining, tmp_path):
    argv, one, two = [*pretraining, "--lr", "2e-4"], tmp_path / "one", tmp_path / "two"
    train(train_pretrain, argv, one)
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr",
                    "127.0.0.1", "--master_port", "29517", driver(tmp_path), *argv, "--out-dir", str(two)],
                   check=True, env=ENVIRONMENT, timeout=300, stdout=subprocess.PIPE)
    assert furthest(one, two, "distiller.") < 1e-5 and furthest(one, two, ".exp_avg") < 1e-6
    assert state_of(two)["metrics"] == pytest.approx(state_of(one)["metrics"], rel=1e-4)
    assert list(metrics(two, "kl").values()) == pytest.approx(list(metrics(one, "kl").values()), rel=1e-4)


@pytest.mark.slow
def test_a_killed_process_goes_on_as_if_nothing_had_been(pretraining, tmp_path):
    argv = [*pretraining, "--steps", "30", "--eval-every", "10", "--save-every", "2"]
    train(train_pretrain, argv, tmp_path / "whole")
    last, deadline = tmp_path / "killed" / "last.safetensors", time.time() + 200
    process = subprocess.Popen([sys.executable, driver(tmp_path, pause=0.2), *argv, "--out-dir",
                                str(last.parent)], env=ENVIRONMENT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    while not (last.exists() and state_of(last.parent)["step"] >= 12) and time.time() < deadline \
            and process.poll() is None:
        time.sleep(0.03)
    process.kill()
    process.wait()
    assert 12 <= state_of(last.parent)["step"] < 30
    train(train_pretrain, argv, last.parent, "--resume")
    assert_same(tmp_path / "whole", last.parent)
    for key in ("kl", "grad_norm", "heldout_kl"):
        assert metrics(last.parent, key) == metrics(tmp_path / "whole", key)


BEGUN = {"model": {"llm": {}}, "trained_on": {}, "ranks": 1, "step": 1, "evaluated": 0, "best": None,
         "bad_evaluations": 0, "metrics": {}, "scaler": {}}


def resume(saved: dict, now: dict) -> None:
    """Check a run that was begun with some flags, to go on with others."""
    old, new = (copy.deepcopy(BEGUN) | {"flags": flags} for flags in (saved, now))
    check_resumable(Path("run"), old, new, run.FIXED_FLAGS)


@pytest.mark.parametrize("flag", [
    "k", "least_k", "seed", "batch_size", "grad_accum", "warmup", "clip", "window", "min_doc_len",
    "context_len", "queries_per_demo", "dtype", "llm_weights", "max_segments", "eval_tasks", "eval_queries",
    "eval_docs"])
def test_no_flag_that_decides_the_result_changes_on_resume(flag):
    resume({flag: 3}, {flag: 3})
    with pytest.raises(UserError, match=f"was trained with --{flag.replace('_', '-')} 3 .now 4."):
        resume({flag: 3}, {flag: 4})


def test_a_run_from_before_max_segments_goes_on():
    resume({}, {"max_segments": 1})
    with pytest.raises(UserError, match="--max-segments None .now 4."):
        resume({}, {"max_segments": 4})


def test_gradients_scaled_as_in_fp16_train_the_same(finetuning, quick_dev, tmp_path, monkeypatch):
    """By a power of two, which fp32 undoes exactly; on the way the scale grows, and a resumed run has it."""
    train(train_finetune, finetuning, tmp_path / "plain")
    scaler = partial(torch.amp.GradScaler, init_scale=256.0, growth_interval=2)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device))
    train(train_finetune, finetuning, tmp_path / "scaled")
    assert state_of(tmp_path / "scaled")["scaler"]["scale"] == 1024.0
    (a, _), (b, _) = (load_checkpoint(tmp_path / name / "last.safetensors") for name in ("plain", "scaled"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    restored = run.Run.restore
    monkeypatch.setattr(run.Run, "restore", lambda self, path: (
        restored(self, path), found.append(self.scaler.get_scale())))
    found: list[float] = []
    train(train_finetune, finetuning, tmp_path / "scaled", "--steps", "5", "--resume")
    assert found == [1024.0]


def test_a_run_that_stops_early_says_so(script, argv, tmp_path, monkeypatch, capsys):
    stub_dev(monkeypatch, script, [1.0, 2.0, 3.0])
    train(script, [*argv, "--eval-every", "1", "--steps", "6", "--patience", "2"], tmp_path / "run")
    assert "stopped early at step 2 of 6: --patience 2\n" in capsys.readouterr().out
