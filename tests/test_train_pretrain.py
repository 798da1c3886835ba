"""Tests of train_pretrain.py, through main(argv): interrupted against uninterrupted, two processes against one."""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import data
import model
import run
import score
import train_pretrain
from common import UserError
from data import Corpus, step_rows
from loading import build_distiller, load_llm
from run import load_checkpoint
from sources.text import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


@pytest.fixture
def argv(flags, corpus_dir) -> list[str]:
    return [*flags, "--vector-start", "matched", "--corpus", str(corpus_dir), "--window", "96", "--k", "4", "--batch-size", "2", "--grad-accum", "2",
            "--eval-docs", "3", "--steps", "4", "--eval-every", "2", "--lr", "1e-3"]


@pytest.fixture
def quick_dev(monkeypatch):
    """The tasks' dev data costs the most time; most tests here are not about it."""
    names = ("val_option_ce", "val_kl", "val_clm")
    monkeypatch.setattr(train_pretrain, "dev_figures", lambda *_: dict.fromkeys(names, 1.0))


def metrics(folder: Path, key: str) -> dict[int, float]:
    """step -> value; a step that is logged twice fails."""
    found = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if key in record:
            assert record["step"] not in found, f"step {record['step']} is logged twice"
            found[record["step"]] = record[key]
    return found


def assert_same(folder: Path, other: Path, file: str = "last.safetensors") -> None:
    """Every tensor equal bit by bit, and the run's state but for its flags."""
    (a, state), (b, other_state) = load_checkpoint(folder / file), load_checkpoint(other / file)
    assert a.keys() == b.keys() and len(a) > 20
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert {**state, "flags": 0} == {**other_state, "flags": 0}


def furthest(a: dict, b: dict, kind: str) -> float:
    """Largest difference between two runs' weights (kind "distiller.") or first moments (".exp_avg")."""
    names = [n for n in a if (n.startswith(kind) if kind == "distiller." else n.endswith(kind))]
    assert a.keys() == b.keys() and len(names) > 10
    return max((a[n] - b[n]).abs().max().item() for n in names)


def interrupt_after(monkeypatch, step: int) -> None:
    """A Ctrl-C right after the record of optimiser step `step` was written, so before its checkpoint."""
    log = run.Run.log

    def stop(run, **record):
        log(run, **record)
        if run.step == step and "grad_norm" in record:
            raise KeyboardInterrupt
    monkeypatch.setattr(run.Run, "log", stop)


def test_end_to_end(argv, tmp_path, capsys, llama, corpus_dir):
    final = train_pretrain.main([*argv, "--out-dir", str(tmp_path / "run")])
    assert final.keys() == {"stage", "steps", "val_kl", "val_kl_no_context", "val_kl_last_l", "recovered", "dev_kl",
                            "dev_clm", "out_dir", "val_option_ce", "best_option_ce"}
    assert (final["stage"], final["steps"], final["out_dir"]) == ("pretrain", 4, str(tmp_path / "run"))
    assert final["recovered"] == pytest.approx(1 - final["val_kl"] / final["val_kl_no_context"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == final
    assert list(metrics(tmp_path / "run", "kl")) == [1, 2, 3, 4]
    assert list(metrics(tmp_path / "run", "val_kl")) == [0, 2, 4]
    state = load_checkpoint(tmp_path / "run" / "last.safetensors", weights=False)[1]
    assert state["trained_on"]["pretrain"]["corpus"] == corpus_dir.name and state["flags"]["window"] == 96
    assert (state["step"], state["evaluated"], state["figures"]["val_kl"]) == (4, 4, final["val_kl"])
    option_ce = metrics(tmp_path / "run", "val_option_ce")  # App. A: the tasks' dev data decides
    assert state["best"] == final["best_option_ce"] == min(option_ce.values())
    llm = load_llm(str(llama), CPU, torch.float32)
    assert state["model"]["llm"]["hidden_size"] == llm.config.hidden_size


def test_default_folder_is_named_after_the_llm(argv, quick_dev, llama):
    final = train_pretrain.main([*argv, "--steps", "1"])
    assert Path(final["out_dir"]) == common.OUT / f"pretrain-{llama.name}"
    assert (common.OUT / f"pretrain-{llama.name}" / "best.safetensors").exists()


def log_softmaxes(llm, context: torch.Tensor, x: list[int]) -> torch.Tensor:
    """What an LLM without cache or packing says about x behind embedded `context`, (len(x) or len(x) - 1, V)."""
    inputs = torch.cat([context, llm.get_input_embeddings()(torch.tensor([x]))], dim=1)
    logits = llm(inputs_embeds=inputs, attention_mask=torch.ones(inputs.shape[:2], dtype=torch.long)).logits[0]
    return logits[max(context.shape[1] - 1, 0):-1].log_softmax(dim=1)


def test_the_first_step_is_eq_3_on_the_whole_step(argv, quick_dev, tmp_path, llama, corpus_dir):
    """Loss and gradient norm of step 1, from one window at a time, full logits and autograd."""
    train_pretrain.main([*argv, "--steps", "1", "--beta", "0.6", "--window", "300", "--seed", "1", "--out-dir", str(tmp_path / "run")])
    llm = load_llm(str(llama), CPU, torch.float32)
    distiller = build_distiller("layers:2", llm, 4, "matched", 1)
    corpus = Corpus([str(corpus_dir)], Tokenizer(str(llama)), 300, 64)
    rows = step_rows(lambda first, count: corpus.training_rows(1, first, count, 0.6), 1, 4)(0)
    counts = [len(row["queries"][0][1][0]) for row in rows]
    assert sum(counts[:2]) != sum(counts[2:])  # else a mean of means would pass
    total, n = 0, 0
    for row in rows:
        demo, ((_, (x,)),) = torch.tensor([row["demo"]]), row["queries"]
        student = log_softmaxes(llm, distiller(demo, torch.ones_like(demo, dtype=torch.bool)), x)
        teacher = log_softmaxes(llm, llm.get_input_embeddings()(demo), x).detach()
        total = total + (teacher.exp() * (teacher - student)).sum()
        n += len(x)
    (total / n).backward()
    norm = torch.stack([p.grad.norm() for p in distiller.parameters() if p.grad is not None]).norm().item()
    assert metrics(tmp_path / "run", "kl")[1] == pytest.approx((total / n).item(), rel=1e-4)
    assert metrics(tmp_path / "run", "grad_norm")[1] == pytest.approx(norm, rel=1e-3)
    assert metrics(tmp_path / "run", "tokens")[1] == n


def tokens_of(query: tuple[list[int], list[list[int]]]) -> list[int]:
    """All tokens of a query with at most one answer."""
    return [*query[0], *itertools.chain(*query[1])]


@pytest.mark.parametrize("objective, gamma", [("clm", 1.0), ("clm+kl", 0.25)])
def test_the_first_step_of_the_other_objectives(argv, quick_dev, tmp_path, llama, corpus_dir, objective, gamma):
    """CLM, and L_CLM + gamma L_distill (App. B): from one window at a time, full logits and autograd."""
    train_pretrain.main([*argv, "--steps", "1", "--objective", objective, "--gamma", str(gamma), "--out-dir", str(tmp_path / "run")])
    llm = load_llm(str(llama), CPU, torch.float32)
    distiller = build_distiller("layers:2", llm, 4, "matched", 100)
    clm, kl, n = 0, 0, 0
    corpus = Corpus([str(corpus_dir)], Tokenizer(str(llama)), 96, 64)
    for row in step_rows(lambda first, count: corpus.training_rows(100, first, count, 0.8), 100, 4)(0):
        demo, x = torch.tensor([row["demo"]]), tokens_of(row["queries"][0])
        student = log_softmaxes(llm, distiller(demo, torch.ones_like(demo, dtype=torch.bool)), x)
        teacher = log_softmaxes(llm, llm.get_input_embeddings()(demo), x).detach()
        clm = clm - student[range(len(x)), x].sum()
        kl = kl + (teacher.exp() * (teacher - student)).sum()
        n += len(x)
    (clm / n + (gamma * kl / n if objective == "clm+kl" else 0)).backward()
    norm = torch.stack([p.grad.norm() for p in distiller.parameters() if p.grad is not None]).norm().item()
    expected = {"clm": clm.item() / n, "grad_norm": norm} | ({"kl": kl.item() / n} if objective == "clm+kl" else {})
    assert {key: metrics(tmp_path / "run", key)[1] for key in expected} == pytest.approx(expected, rel=1e-3)
    assert metrics(tmp_path / "run", "kl").keys() == ({1} if objective == "clm+kl" else set())
    state = load_checkpoint(tmp_path / "run" / "last.safetensors", weights=False)[1]
    assert (state["trained_on"]["pretrain"]["objective"], state["trained_on"]["pretrain"]["gamma"]) == (objective, gamma)


@pytest.mark.parametrize("objective, passes", [("kl", 8), ("clm", 0), ("clm+kl", 8)])
def test_clm_does_not_run_the_teacher(argv, quick_dev, tmp_path, monkeypatch, objective, passes):
    calls, prefix = [], model.demo_prefix
    monkeypatch.setattr(model, "demo_prefix", lambda *a: calls.append(1) or prefix(*a))
    monkeypatch.setattr(train_pretrain, "evaluate_kl", lambda *_: {"val_kl": 1.0, "val_kl_no_context": 1.0, "val_kl_last_l": 1.0,
                                                                   "recovered": 0.0})
    train_pretrain.main([*argv, "--objective", objective, "--out-dir", str(tmp_path / "run")])
    assert len(calls) == passes  # four steps of two micro-batches


@pytest.mark.parametrize("objective", ["kl", "clm", "clm+kl"])
def test_every_objective_selects_by_option_ce(argv, tmp_path, monkeypatch, objective):
    feed = iter([(9.0, 1.0, 1.0), (5.0, 2.0, 9.0), (2.0, 9.0, 9.0), (1.5, 5.0, 5.0), (3.0, 4.0, 4.0)])
    monkeypatch.setattr(train_pretrain, "dev_figures", lambda *_: dict(
        zip(("val_option_ce", "val_kl", "val_clm"), next(feed), strict=True)))
    gamma = ["--gamma", "0.5"] if objective == "clm+kl" else []
    argv = [*argv, "--eval-every", "1", "--objective", objective, *gamma, "--out-dir", str(tmp_path / "run")]
    train_pretrain.main(argv)
    state = load_checkpoint(tmp_path / "run" / "best.safetensors", weights=False)[1]
    assert (state["step"], state["best"]) == (3, 1.5)
    with pytest.raises(UserError, match="--resume: .* was trained with .*give the flags of that run"):
        train_pretrain.main([*argv, "--objective", "clm+kl", "--gamma", "0.25", "--resume"])


def test_held_out_kl_and_its_references_against_one_window_at_a_time(argv, quick_dev, tmp_path, llama, corpus_dir):
    final = train_pretrain.main([*argv, "--steps", "1", "--eval-docs", "5", "--min-doc-len", "8", "--out-dir", str(tmp_path / "run")])
    llm = load_llm(str(llama), CPU, torch.float32)
    distiller = build_distiller("layers:2", llm, 4, "matched", 100).eval()
    tensors, _ = load_checkpoint(tmp_path / "run" / "last.safetensors")
    distiller.load_state_dict({k.removeprefix("distiller."): t for k, t in tensors.items() if k.startswith("distiller.")})
    corpus = Corpus([str(corpus_dir)], Tokenizer(str(llama)), 96, 8)
    kl = {"val_kl": [], "val_kl_no_context": [], "val_kl_last_l": []}
    with torch.no_grad():
        for d in corpus.held_out[:5]:
            row = corpus.row(d, 0.8)
            demo, ((_, (x,)),) = torch.tensor([row["demo"]]), row["queries"]
            embedded = llm.get_input_embeddings()(demo)
            teacher = log_softmaxes(llm, embedded, x)[1:]
            contexts = {"val_kl": distiller(demo, torch.ones_like(demo, dtype=torch.bool)), "val_kl_no_context": embedded[:, :0],
                        "val_kl_last_l": embedded[:, -4:]}
            for name, context in contexts.items():
                student = log_softmaxes(llm, context, x)[-(len(x) - 1):]
                kl[name] += F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1).tolist()
    assert {name: final[name] for name in kl} == pytest.approx({name: np.mean(v) for name, v in kl.items()}, rel=1e-4)


def test_learning_rate_rises_and_falls_over_all_steps(argv, quick_dev, tmp_path, monkeypatch):
    rates, end_step = [], run.Run.end_step
    monkeypatch.setattr(run.Run, "end_step", lambda run, n_tokens: (
        rates.append([group["lr"] for group in run.optimizer.param_groups]), end_step(run, n_tokens))[1])
    argv = [*argv, "--steps", "6", "--warmup", "0.34", "--lr", "0.01", "--eval-every", "6", "--out-dir", str(tmp_path / "run")]
    train_pretrain.main(argv)
    assert rates == [pytest.approx([0.01 * share] * 2) for share in (1 / 2, 1, 1, 3 / 4, 2 / 4, 1 / 4)]


@pytest.mark.parametrize("clip, bound", [("0.001", 0.001), ("0", None)])
def test_gradients_are_clipped_to_the_given_norm(argv, quick_dev, tmp_path, monkeypatch, clip, bound):
    norms, step = [], torch.optim.AdamW.step

    def record(optimizer, *a, **kw):
        gradients = [p.grad.norm() for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.stack(gradients).norm().item())
        return step(optimizer, *a, **kw)
    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    train_pretrain.main([*argv, "--clip", clip, "--eval-every", "4", "--out-dir", str(tmp_path / "run")])
    logged = list(metrics(tmp_path / "run", "grad_norm").values())  # as they were before clipping
    assert min(logged) > 0.001
    assert norms == pytest.approx([bound] * 4 if bound else logged, rel=1e-2 if bound else 1e-5)


def test_two_micro_batches_equal_one_large_batch(argv, quick_dev, tmp_path):
    argv = [*argv, "--lr", "2e-4"]  # Adam divides by the gradient's size, so it enlarges rounding where that is near zero
    for name, size in (("two", ["--batch-size", "2", "--grad-accum", "2"]), ("one", ["--batch-size", "4", "--grad-accum", "1"]),
                       ("other", ["--batch-size", "3", "--grad-accum", "1"])):
        train_pretrain.main([*argv, *size, "--out-dir", str(tmp_path / name)])
    two, one, other = (load_checkpoint(tmp_path / name / "last.safetensors")[0] for name in ("two", "one", "other"))
    assert furthest(two, one, "distiller.") < 1e-5 and furthest(two, one, ".exp_avg") < 1e-6
    assert furthest(other, one, "distiller.") > 1e-4 and furthest(other, one, ".exp_avg") > 1e-4


def test_every_sample_is_read_once(argv, quick_dev, tmp_path, monkeypatch):
    asked, rows = [], Corpus.training_rows
    monkeypatch.setattr(Corpus, "training_rows", lambda corpus, seed, first, count, beta: (
        asked.append((seed, first, count)),
        [row | {"sample": first + i} for i, row in enumerate(rows(corpus, seed, first, count, beta))])[1])
    read, collate = [], data.collate
    monkeypatch.setattr(train_pretrain, "collate", lambda rows, device: (read.extend(rows), collate(rows, device))[1])
    train_pretrain.main([*argv, "--steps", "66", "--eval-every", "66", "--eval-docs", "1", "--out-dir", str(tmp_path / "run")])
    assert asked == [(100, 0, 256), (100, 256, 256)]  # 64 steps at a time, sorted by length together
    read = [row for row in read if "sample" in row]
    samples = [row["sample"] for row in read]
    assert sorted(samples[:256]) == list(range(256)) and len(set(samples)) == 66 * 4


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # gpt2 has dropout, which must be drawn again alike
def test_a_run_that_was_interrupted_equals_one_that_was_not(argv, request, tmp_path, monkeypatch, family):
    argv = [*argv, "--llm", str(request.getfixturevalue(family)), "--save-every", "1"]
    train_pretrain.main([*argv, "--out-dir", str(tmp_path / "whole")])
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train_pretrain.main([*argv, "--out-dir", str(tmp_path / "cut")])
    assert load_checkpoint(tmp_path / "cut" / "last.safetensors", weights=False)[1]["step"] == 2
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "k')  # a kill in the middle of a line
    final = train_pretrain.main([*argv, "--out-dir", str(tmp_path / "cut"), "--resume"])
    assert_same(tmp_path / "whole", tmp_path / "cut")
    assert_same(tmp_path / "whole", tmp_path / "cut", "best.safetensors")
    for key in ("kl", "grad_norm", "val_kl", "dev_kl"):
        assert metrics(tmp_path / "cut", key) == metrics(tmp_path / "whole", key)
    again = train_pretrain.main([*argv, "--out-dir", str(tmp_path / "cut"), "--resume"])  # nothing is left to do
    assert again == final
    assert_same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("where", ["best.safetensors", "last.safetensors"])
def test_an_evaluation_cut_off_before_its_checkpoint_is_logged_once(argv, tmp_path, monkeypatch, where):
    stub_dev(monkeypatch, [4.0, 3.0, 2.0, 1.0], [])
    argv = [*argv, "--save-every", "1", "--out-dir", str(tmp_path / "run")]
    save = run.save_checkpoint

    def crash(path, distiller, state, optimizer=None):
        if path.name == where and state["evaluated"] == 2:
            raise KeyboardInterrupt
        save(path, distiller, state, optimizer)
    with monkeypatch.context() as patch:
        patch.setattr(run, "save_checkpoint", crash)
        with pytest.raises(KeyboardInterrupt):
            train_pretrain.main(argv)
    train_pretrain.main([*argv, "--resume"])
    assert list(metrics(tmp_path / "run", "val_kl")) == [0, 2, 4]


def test_dropout_is_drawn_in_training_and_not_in_evaluation(argv, quick_dev, tmp_path, gpt2, monkeypatch):
    argv = [*argv, "--llm", str(gpt2), "--steps", "1", "--lr", "1e-30"]
    finals = []
    for seed_shift in (0, 1):  # the same weights and data, other dropout
        seed = torch.manual_seed
        monkeypatch.setattr(torch, "manual_seed", lambda s, seed=seed, shift=seed_shift: seed(s + shift * (s > 1_000_000)))
        finals.append(train_pretrain.main([*argv, "--out-dir", str(tmp_path / str(seed_shift))]))
    assert finals[0]["val_kl"] == pytest.approx(finals[1]["val_kl"], rel=1e-6)
    assert metrics(tmp_path / "0", "kl")[1] != pytest.approx(metrics(tmp_path / "1", "kl")[1], rel=1e-6)


def test_pretraining_lowers_the_kl(argv, quick_dev, tmp_path, corpus_dir):
    lines = (corpus_dir / "part.jsonl").read_text().splitlines()[:22]  # few enough to learn by heart
    (tmp_path / "few.jsonl").write_text("\n".join(lines))
    argv = [*argv, "--corpus", str(tmp_path / "few.jsonl"), "--steps", "80", "--lr", "1e-2", "--batch-size", "8", "--grad-accum", "1",
            "--eval-every", "80"]
    train_pretrain.main([*argv, "--out-dir", str(tmp_path / "run")])
    kl = list(metrics(tmp_path / "run", "kl").values())
    assert np.mean(kl[-5:]) < 0.7 * np.mean(kl[:3])


def stub_dev(monkeypatch, values: list[float], seen: list) -> None:
    feed = iter(values)

    def figures(llm, distiller, *_):
        seen.append({name: t.clone() for name, t in distiller.state_dict().items()})
        return {"val_option_ce": next(feed), "val_kl": 0.0, "val_clm": 0.0}
    monkeypatch.setattr(train_pretrain, "dev_figures", figures)


def test_best_is_the_checkpoint_with_the_lowest_option_ce(argv, tmp_path, monkeypatch):
    seen = []
    stub_dev(monkeypatch, [4.0, 3.0, 1.0, 2.0, 1.0], seen)
    train_pretrain.main([*argv, "--eval-every", "1", "--out-dir", str(tmp_path / "run")])
    best, state = load_checkpoint(tmp_path / "run")
    assert (state["step"], state["best"], state["figures"]["val_option_ce"]) == (2, 1.0, 1.0)
    assert all(torch.equal(best[f"distiller.{name}"], t) for name, t in seen[2].items())
    assert not all(torch.equal(best[f"distiller.{name}"], t) for name, t in seen[3].items())
    assert load_checkpoint(tmp_path / "run" / "last.safetensors", weights=False)[1]["bad_evaluations"] == 2


@pytest.mark.parametrize("patience, values, last_step", [
    ("1", [2.0, 3.0, 1.0, 1.0], 2), ("2", [2.0, 3.0, 1.0, 4.0, 4.0, 0.5], 5), ("0", [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 6)])
def test_early_stopping(argv, tmp_path, monkeypatch, patience, values, last_step):
    stub_dev(monkeypatch, [9.0, *values], [])
    argv = [*argv, "--eval-every", "1", "--steps", "6", "--patience", patience, "--out-dir", str(tmp_path / "run")]
    assert train_pretrain.main(argv)["steps"] == last_step
    assert train_pretrain.main([*argv, "--resume"])["steps"] == last_step  # stays stopped


# Errors


def test_more_steps_on_resume_are_told(argv, quick_dev, tmp_path, capsys):
    argv = [*argv, "--out-dir", str(tmp_path / "run"), "--resume", "--steps"]
    train_pretrain.main([*argv, "1"])
    assert "note: --steps" not in capsys.readouterr().out
    assert train_pretrain.main([*argv, "2"])["steps"] == 2
    assert "note: --steps was 1 and is 2" in capsys.readouterr().out


def test_an_existing_run_needs_resume(argv, quick_dev, tmp_path):
    argv = [*argv, "--steps", "1", "--out-dir", str(tmp_path / "run")]
    train_pretrain.main(argv)
    before = (tmp_path / "run" / "last.safetensors").read_bytes(), (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="holds a run already; add --resume"):
        train_pretrain.main(argv)
    for change in (["--distill-len", "5"], ["--min-doc-len", "9"], ["--clip", "0.5"], ["--dtype", "bf16"], ["--llm-weights", "bf16"]):
        with pytest.raises(UserError, match="give the flags of that run"):
            train_pretrain.main([*argv, *change, "--resume"])
    assert before == ((tmp_path / "run" / "last.safetensors").read_bytes(), (tmp_path / "run" / "metrics.jsonl").read_bytes())


def test_flag_faults_come_together(argv):
    faults = {"--beta": "1", "--window": "4", "--lr": "0", "--steps": "0", "--grad-accum": "0", "--batch-size": "0", "--clip": "-1",
              "--warmup": "2", "--patience": "-1", "--eval-every": "0", "--save-every": "0", "--min-doc-len": "0", "--k": "0"}
    with pytest.raises(UserError) as error:
        train_pretrain.main([*argv, *itertools.chain(*faults.items())])
    assert [flag for flag in faults if f"{flag} is " not in str(error.value)] == []


@pytest.mark.parametrize("change, message", [
    (["--distiller", "free"], "--distiller free reads no text, so there is nothing to pretrain"),
    (["--gamma", "2"], "--gamma only has a meaning with --objective clm.kl"),
    (["--gamma", "0", "--objective", "clm+kl"], "--gamma is 0.0; give a positive number"),
    (["--eval-docs", "0"], "--eval-docs"), (["--context-len", "0"], "--context-len"),
    (["--distiller", "layers:9"], "give layers:1 to layers:3"), (["--corpus", "/nowhere"], "--corpus /nowhere"),
    (["--min-doc-len", "5000"], "0 of 60 documents"), (["--tasks", "/nowhere"], "--tasks /nowhere")])
def test_user_errors_come_before_the_first_step(argv, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(run.Run, "begin_step", lambda *_: pytest.fail("a step was made"))
    with pytest.raises(UserError, match=message):
        train_pretrain.main([*argv, *change])


def test_batch_must_be_shared_evenly_by_the_ranks(argv, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="--batch-size 2 cannot be shared by 3 ranks"):
        train_pretrain.main(argv)


def test_window_longer_than_the_llm_reads(argv, gpt2):
    with pytest.raises(UserError, match="--window is 700, and the LLM reads at most 640 tokens"):
        train_pretrain.main([*argv, "--llm", str(gpt2), "--window", "700"])


def test_a_loss_that_is_not_finite_stops_and_names_the_step(argv, quick_dev, tmp_path, monkeypatch):
    loss, calls = score.distill_loss, []

    def breaks(*a):
        calls.extend([1] * torch.is_grad_enabled())  # not in evaluation
        return loss(*a) * (float("nan") if len(calls) == 4 else 1)  # the second micro-batch of the second step
    monkeypatch.setattr(train_pretrain, "distill_loss", breaks)
    with pytest.raises(UserError, match="the loss at step 1 is nan; lower --lr"):
        train_pretrain.main([*argv, "--eval-every", "4", "--save-every", "1", "--out-dir", str(tmp_path / "run")])
    tensors, state = load_checkpoint(tmp_path / "run" / "last.safetensors")
    assert state["step"] == 1 and all(t.isfinite().all() for t in tensors.values())


def test_user_errors_end_with_code_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        common.run_main(lambda: train_pretrain.main([*argv, "--beta", "2"]))
    assert stop.value.code == 2 and "Traceback" not in capsys.readouterr().err


# Processes

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
    """A script that runs train_pretrain.py with its cache in `folder`, resting `pause` seconds before each step."""
    path = folder / "driver.py"
    path.write_text(DRIVER.format(root=str(ROOT), folder=str(folder), pause=pause))
    return str(path)


ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


@pytest.mark.slow
def test_two_processes_train_like_one(argv, tmp_path):
    argv = [*argv, "--lr", "2e-4"]
    train_pretrain.main([*argv, "--out-dir", str(tmp_path / "one")])
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1",
                    "--master_port", "29517", driver(tmp_path), *argv, "--out-dir", str(tmp_path / "two")],
                   check=True, env=ENVIRONMENT, timeout=300, stdout=subprocess.PIPE)
    one, state = load_checkpoint(tmp_path / "one" / "last.safetensors")
    two, other = load_checkpoint(tmp_path / "two" / "last.safetensors")
    assert furthest(one, two, "distiller.") < 1e-5 and furthest(one, two, ".exp_avg") < 1e-6
    assert other["figures"] == pytest.approx(state["figures"], rel=1e-4)
    assert list(metrics(tmp_path / "two", "kl").values()) == pytest.approx(list(metrics(tmp_path / "one", "kl").values()), rel=1e-4)


@pytest.mark.slow
def test_a_killed_process_goes_on_as_if_nothing_had_been(argv, tmp_path):
    argv = [*argv, "--steps", "30", "--eval-every", "10", "--save-every", "2"]
    train_pretrain.main([*argv, "--out-dir", str(tmp_path / "whole")])
    last = tmp_path / "killed" / "last.safetensors"
    process = subprocess.Popen([sys.executable, driver(tmp_path, pause=0.2), *argv, "--out-dir", str(last.parent)], env=ENVIRONMENT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 200
    while not (last.exists() and load_checkpoint(last, weights=False)[1]["step"] >= 12) and time.time() < deadline and process.poll() is None:
        time.sleep(0.03)
    process.kill()
    process.wait()
    assert 12 <= load_checkpoint(last, weights=False)[1]["step"] < 30
    train_pretrain.main([*argv, "--out-dir", str(last.parent), "--resume"])
    assert_same(tmp_path / "whole", last.parent)
    for key in ("kl", "grad_norm", "val_kl"):
        assert metrics(last.parent, key) == metrics(tmp_path / "whole", key)


def test_a_window_that_fills_the_llm_is_taken(argv, quick_dev, tmp_path, gpt2):
    """As in the paper preset: gpt2-large reads 1,024 tokens and the window is 1,024."""
    argv = [*argv, "--llm", str(gpt2), "--steps", "1", "--out-dir", str(tmp_path / "run")]
    assert train_pretrain.main([*argv, "--window", "640"])["steps"] == 1
    with pytest.raises(UserError, match="make 644 tokens, and the distiller reads at most 640"):
        train_pretrain.main([*argv, "--window", "640", "--beta", "0.9", "--distill-len", "68"])
