"""Tests of train_pretrain.py and train_finetune.py through main(argv): what both do, then what only one
does."""

import contextlib
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import load, log_softmaxes, make_distiller, model_of
from training import METRICS, PROMPT_TUNING, furthest, metrics, state_of, stub_dev, train

import common
import data
import evaluate
import loading
import model
import paper.held_out
import run
import train_finetune
import train_pretrain
from common import UserError
from data import Corpus, Formatter, sample_row, step_rows
from loading import build_distiller, load_checkpoint
from run import save_checkpoint
from sources.text import Tokenizer

FINETUNED = {"tasks": "metaicl", "split": "class_to_class", "lam": 1.0, "pred_weight": 1.0}


def without_hashes(trained_on: dict) -> dict:
    return {stage: {name: value for name, value in about.items() if "hash" not in name}
            for stage, about in trained_on.items()}


def vectors_of(distiller, demo: torch.Tensor) -> torch.Tensor:
    return distiller(demo, torch.ones_like(demo, dtype=torch.bool))


def norm_of_gradients(distiller) -> float:
    return torch.stack([p.grad.norm() for p in distiller.parameters() if p.grad is not None]).norm().item()


# Both stages

EVERY = {"stage", "steps", *METRICS, "best_option_ce", "out_dir"}
KEYS = {train_pretrain: EVERY | {"heldout_kl", "heldout_kl_no_context", "heldout_kl_last_l", "recovered"},
        train_finetune: EVERY | {"split"}}


def test_end_to_end(script, argv, tmp_path, capsys, llama_llm, corpus_dir):
    finetune = script is train_finetune
    final = train(script, argv, tmp_path / "run", *(["--lam", "0.1"] if finetune else []))
    assert final.keys() == KEYS[script]
    assert (final["steps"], final["out_dir"]) == (4, str(tmp_path / "run"))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == final
    for key in ["kl", "pred"] if finetune else ["kl"]:
        assert list(metrics(tmp_path / "run", key)) == [1, 2, 3, 4]
    for key in ["dev_kl", "dev_pred"] if finetune else ["dev_kl", "heldout_kl"]:
        assert list(metrics(tmp_path / "run", key)) == [0, 2, 4]
    state, option_ce = state_of(tmp_path / "run"), metrics(tmp_path / "run", "dev_option_ce")
    assert (state["step"], state["evaluated"], state["metrics"]["dev_kl"]) == (4, 4, final["dev_kl"])
    assert state["best"] == final["best_option_ce"] == min(option_ce.values()) and len(option_ce) == 3
    assert state["model"]["llm"]["hidden_size"] == llama_llm.config.hidden_size
    if finetune:
        assert (final["stage"], final["split"]) == ("finetune", "class_to_class")
        assert without_hashes(state["trained_on"]) == {"finetune": FINETUNED | {"lam": 0.1}}
    else:
        assert final["stage"] == "pretrain"
        assert final["recovered"] == pytest.approx(1 - final["heldout_kl"] / final["heldout_kl_no_context"])
        assert state["trained_on"]["pretrain"]["corpus"] == corpus_dir.name and state["flags"]["window"] == 96


def test_default_folder_is_named_after_the_llm_and_the_split(script, argv, quick_dev, llama):
    name = {train_pretrain: f"pretrain-{llama.name}",
            train_finetune: f"finetune-{llama.name}-class_to_class"}[script]
    assert Path(script.main([*argv, "--steps", "1"])["out_dir"]) == common.OUT / name
    assert (common.OUT / name / "best.safetensors").exists()


@pytest.mark.parametrize("script, more, passes", [
    (train_pretrain, ["--objective", "kl"], 8), (train_pretrain, ["--objective", "clm"], 0),
    (train_pretrain, ["--objective", "clm+kl"], 8), (train_finetune, ["--lam", "0"], 0),
    (train_finetune, ["--lam", "1"], 8)], indirect=["script"])
def test_the_teacher_runs_only_for_its_loss(script, argv, quick_dev, tmp_path, monkeypatch, more, passes):
    calls, prefix = [], model.demo_prefix
    monkeypatch.setattr(model, "demo_prefix", lambda *a: calls.append(1) or prefix(*a))
    monkeypatch.setattr(train_pretrain, "evaluate_kl", lambda *_: dict.fromkeys(
        ("heldout_kl", "heldout_kl_no_context", "heldout_kl_last_l", "recovered"), 1.0))
    train(script, argv, tmp_path / "run", *more)
    assert len(calls) == passes  # four steps of two micro-batches


def test_the_start_is_evaluated_once(script, argv, quick_dev, monkeypatch, tmp_path):
    """Before the first step, with the distiller as it starts, and not again in a run that goes on."""
    calls = []
    monkeypatch.setattr(script, "dev_metrics", lambda llm, distiller, *_: (
        calls.append(sum(p.sum().item() for p in distiller.parameters())), dict.fromkeys(METRICS, 1.0))[1])
    argv = [*argv, "--eval-every", "9", "--steps", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "begin_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            train(script, argv, tmp_path / "run")
    assert len(calls) == 1 and list(metrics(tmp_path / "run", "dev_kl")) == [0]
    train(script, argv, tmp_path / "run", "--resume")
    assert len(calls) == 2 and calls[0] != calls[1] and list(metrics(tmp_path / "run", "dev_kl")) == [0, 2]


def test_a_bf16_run_is_evaluated_in_fp32(script, argv, llama, monkeypatch, tmp_path):
    """On weights that bf16 holds exactly: as in an fp32 run, and far from figures in bf16."""
    folder = shutil.copytree(llama, tmp_path / "models" / llama.name)
    load(llama).to(torch.bfloat16).float().save_pretrained(folder)
    start = {}
    for dtype, exact in (("fp32", True), ("bf16", True), ("bf16", False)):
        if not exact:
            monkeypatch.setattr(script, "full_precision", lambda llm: contextlib.nullcontext())
        at = tmp_path / f"{dtype}-{exact}"
        train(script, argv, at, "--llm", str(folder), "--steps", "1", "--dtype", dtype)
        start[dtype, exact] = {key: metrics(at, key)[0] for key in ("dev_kl", "dev_option_ce")}
    assert start["bf16", True] == pytest.approx(start["fp32", True], rel=1e-5)
    assert start["bf16", False] != pytest.approx(start["fp32", True], rel=1e-4)


FAULTS = {train_pretrain: {"--beta": "1", "--window": "4", "--min-doc-len": "0"},
          train_finetune: {"--lam": "-1", "--queries-per-demo": "0", "--context-len": "255"}}


def test_flag_faults_come_together(script, argv):
    faults = FAULTS[script] | {"--lr": "0", "--steps": "0", "--grad-accum": "0", "--batch-size": "0",
                               "--clip": "-1", "--warmup": "2", "--patience": "-1", "--eval-every": "0",
                               "--save-every": "0", "--k": "0"}
    with pytest.raises(UserError) as error:
        script.main([*argv, *itertools.chain(*faults.items())])
    assert [flag for flag in faults if f"{flag} is " not in str(error.value)] == []


@pytest.mark.parametrize("script, change, message", [
    (train_pretrain, ["--distiller", "free"],
     "--distiller free reads no text, so there is nothing to pretrain"),
    (train_pretrain, ["--gamma", "2"], "--gamma only has a meaning with --objective clm.kl"),
    (train_pretrain, ["--gamma", "0", "--objective", "clm+kl"], "--gamma is 0.0; give a positive number"),
    (train_pretrain, ["--lr", "1e38"], "--lr is 1e.38; give a positive number below a million"),
    (train_pretrain, ["--eval-docs", "0"], "--eval-docs"), (train_pretrain, ["--context-len", "0"],
                                                            "--context-len"),
    (train_pretrain, ["--distiller", "layers:9"], "give layers:1 to layers:3"),
    (train_pretrain, ["--corpus", "/nowhere"], "--corpus /nowhere"),
    (train_pretrain, ["--min-doc-len", "5000"], "0 of 60 documents"),
    (train_pretrain, ["--tasks", "/nowhere"], "--tasks /nowhere"),
    (train_pretrain, ["--max-segments", "3000"], "--distill-len is 4, which in 3000 segments"),
    (train_finetune, ["--max-segments", "3000"], "--distill-len is 4, .* of task .* for 12000 vectors"),
    (train_pretrain, ["--corpus", "c4", "sotu"], "--corpus c4: c4 does not exist; give c4 alone"),
    (train_finetune, ["--k", "59"],
     "has [0-9]+ different examples, and --k 59 with --queries-per-demo 2 needs 61"),
    (train_finetune, ["--lam", "0", "--pred-weight", "0"],
     "--lam and --pred-weight are both 0, so there is no loss"),
    (train_finetune, ["--pred-weight", "-1"], "--pred-weight is -1.0"),
    (train_finetune, ["--distiller", "free", "--init-from", "none"], "add --init-from none --lam 0"),
    (train_finetune, [*PROMPT_TUNING, "--init-from", "/nowhere"], "add --init-from none --lam 0"),
    (train_finetune, ["--init-from", "/nowhere"], "no checkpoint at /nowhere"),
    (train_finetune, ["--split", "qa_to_qa"], "of qa_to_qa"),
    (train_finetune, ["--tasks", "/nowhere"], "--tasks /nowhere"),
    (train_finetune, ["--distiller", "layers:x"], "whole number N")], indirect=["script"])
def test_user_errors_come_before_the_first_step(script, argv, monkeypatch, change, message):
    monkeypatch.setattr(run.Run, "begin_step", lambda *_: pytest.fail("a step was made"))
    with pytest.raises(UserError, match=message):
        script.main([*argv, *change])


# Pretraining

@pytest.mark.parametrize("objective, gamma", [("kl", 1.0), ("clm", 1.0), ("clm+kl", 0.25)])
def test_the_first_step_is_eq_3(pretraining, quick_dev, tmp_path, llama, llama_llm,
                                                  corpus_dir, objective, gamma):
    """Or CLM, or L_CLM + gamma L_distill (App. B): from one window at a time, full logits and autograd."""
    more = ["--steps", "1", "--objective", objective, "--beta", "0.6", "--window", "300", "--seed", "1"]
    train(train_pretrain, pretraining, tmp_path / "run", *more, "--gamma", str(gamma))
    distiller = build_distiller("layers:2", llama_llm, 4, "matched", 1)
    corpus = Corpus([str(corpus_dir)], Tokenizer(str(llama)), 300, 64)
    rows = step_rows(lambda first, count: corpus.training_rows(1, first, count, 0.6), 1, 4)(0)
    counts = [len(row["queries"][0][1][0]) for row in rows]
    assert sum(counts[:2]) != sum(counts[2:])  # else a mean of means would pass
    clm, kl, n = 0, 0, sum(counts)
    for row in rows:
        demo, ((_, (x,)),) = torch.tensor([row["demo"]]), row["queries"]
        student = log_softmaxes(llama_llm, vectors_of(distiller, demo), x)
        teacher = log_softmaxes(llama_llm, llama_llm.get_input_embeddings()(demo), x).detach()
        clm = clm - student[range(len(x)), x].sum() / n
        kl = kl + (teacher.exp() * (teacher - student)).sum() / n
    {"kl": kl, "clm": clm, "clm+kl": clm + gamma * kl}[objective].backward()
    logged = {name: loss.item() for name, loss in (("kl", kl), ("clm", clm)) if name in objective.split("+")}
    expected = logged | {"grad_norm": norm_of_gradients(distiller), "tokens": n}
    assert {key: metrics(tmp_path / "run", key)[1] for key in expected} == pytest.approx(expected, rel=1e-3)
    assert [key for key in ("kl", "clm") if metrics(tmp_path / "run", key)] == list(logged)
    about = state_of(tmp_path / "run")["trained_on"]["pretrain"]
    assert (about["objective"], about["gamma"]) == (objective, gamma)
    with pytest.raises(UserError, match="--resume: .* was trained with .*give the flags of that run"):
        train(train_pretrain, pretraining, tmp_path / "run", *more, "--objective", "clm+kl", "--gamma", "2",
              "--resume")


def test_held_out_kl_against_one_window_at_a_time(pretraining, quick_dev, tmp_path, llama,
                                                                     llama_llm, corpus_dir):
    more = ["--steps", "1", "--eval-docs", "5", "--min-doc-len", "8"]
    final = train(train_pretrain, pretraining, tmp_path / "run", *more)
    distiller = make_distiller(llama_llm)
    tensors, _ = load_checkpoint(tmp_path / "run" / "last.safetensors")
    distiller.load_state_dict({k[len("distiller."):]: t for k, t in tensors.items()
                               if k.startswith("distiller.")})
    corpus = Corpus([str(corpus_dir)], Tokenizer(str(llama)), 96, 8)
    kl = {"heldout_kl": [], "heldout_kl_no_context": [], "heldout_kl_last_l": []}
    with torch.no_grad():
        for d in corpus.held_out[:5]:
            row = corpus.row(d, 0.8)
            demo, ((_, (x,)),) = torch.tensor([row["demo"]]), row["queries"]
            embedded = llama_llm.get_input_embeddings()(demo)
            teacher = log_softmaxes(llama_llm, embedded, x)[1:]
            contexts = {"heldout_kl": vectors_of(distiller, demo), "heldout_kl_no_context": embedded[:, :0],
                        "heldout_kl_last_l": embedded[:, -4:]}
            for name, context in contexts.items():
                student = log_softmaxes(llama_llm, context, x)[-(len(x) - 1):]
                kl[name] += F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1).tolist()
    kl = {name: np.mean(values) for name, values in kl.items()}
    assert {name: final[name] for name in kl} == pytest.approx(kl, rel=1e-4)


def rows_collated(script, monkeypatch) -> list[dict]:
    """The rows that `script` makes batches of from now on."""
    read, collate = [], data.collate
    monkeypatch.setattr(script, "collate", lambda rows, *more: (read.extend(rows), collate(rows, *more))[1])
    return read


def test_every_window_is_read_once(pretraining, quick_dev, tmp_path, monkeypatch):
    asked, rows = [], Corpus.training_rows
    monkeypatch.setattr(Corpus, "training_rows", lambda corpus, seed, first, count, beta: (
        asked.append((seed, first, count)),
        [row | {"sample": first + i} for i, row in enumerate(rows(corpus, seed, first, count, beta))])[1])
    read = rows_collated(train_pretrain, monkeypatch)
    train(train_pretrain, pretraining, tmp_path / "run", "--steps", "66", "--eval-every", "66", "--eval-docs",
          "1", "--batch-size", "1", "--grad-accum", "1", "--window", "32")
    assert asked == [(100, 0, 64), (100, 64, 64)]  # 64 steps at a time, sorted by length together
    samples = [row["sample"] for row in read if "sample" in row]
    assert sorted(samples[:64]) == list(range(64)) and len(set(samples)) == len(samples) == 66


def test_a_window_that_fills_the_llm_is_taken_and_a_longer_one_is_not(pretraining, quick_dev, tmp_path, gpt2):
    """As in the paper preset: gpt2-large reads 1,024 tokens and the window is 1,024."""
    argv = [*pretraining, "--llm", str(gpt2), "--steps", "1"]
    with pytest.raises(UserError, match="--window is 700, and the LLM reads at most 640 tokens"):
        train(train_pretrain, argv, tmp_path / "run", "--window", "700")
    assert train(train_pretrain, argv, tmp_path / "run", "--window", "640")["steps"] == 1
    with pytest.raises(UserError, match="make 644 tokens, and the distiller reads at most 640"):
        train(train_pretrain, argv, tmp_path / "run", "--window", "640", "--beta", "0.9", "--distill-len",
              "68")


# Finetuning

@pytest.mark.parametrize("lam, pred_weight", [(0.0, 1.0), (0.5, 1.0), (0.5, 0.0)])
@pytest.mark.parametrize("template", ["space", "newline"])
def test_the_first_step_is_eq_4(finetuning, quick_dev, tmp_path, llama, llama_llm,
                                                  tiny_tasks, lam, pred_weight, template):
    """Losses and gradient norm of step 1, from one query at a time, full logits and autograd."""
    train(train_finetune, finetuning, tmp_path / "run", "--steps", "1", "--lam", str(lam), "--pred-weight",
          str(pred_weight), "--template", template)
    distiller = build_distiller("layers:2", llama_llm, 4, "matched", 100)
    formatter = Formatter(Tokenizer(str(llama)), template, 450, 4, 2048, 2048)
    pred, kl, answers, tokens = 0, 0, 0, 0
    rows = step_rows(lambda _, n: [sample_row(tiny_tasks, formatter, 100, i, 4, 2) for i in range(n)], 100,
                     4)(0)
    for row in rows:
        demo = torch.tensor([row["demo"]])
        vectors = vectors_of(distiller, demo)
        assert len(row["queries"]) == 2
        for x, (y,) in row["queries"]:
            student = log_softmaxes(llama_llm, vectors, x + y)
            teacher = log_softmaxes(llama_llm, llama_llm.get_input_embeddings()(demo), x + y).detach()
            kl = kl + (teacher.exp() * (teacher - student)).sum()
            pred = pred - student[range(len(x), len(x + y)), y].sum()
            answers, tokens = answers + len(y), tokens + len(x + y)
    pred, kl = pred / answers, kl / tokens
    (pred_weight * pred + lam * kl).backward()
    expected = {"grad_norm": norm_of_gradients(distiller), "tokens": tokens} \
        | ({"pred": pred.item()} if pred_weight else {}) | ({"kl": kl.item()} if lam else {})
    assert {key: metrics(tmp_path / "run", key)[1] for key in expected} == pytest.approx(expected, rel=1e-3)
    assert all(not metrics(tmp_path / "run", key) for key in {"pred", "kl"} - expected.keys())


def test_checkpointing_the_llm_changes_no_step(finetuning, quick_dev, tmp_path):
    kept, again = tmp_path / "kept", tmp_path / "again"
    train(train_finetune, finetuning, kept, "--lr", "2e-4")
    train(train_finetune, finetuning, again, "--lr", "2e-4", "--grad-checkpoint")
    assert furthest(kept, again, "distiller.") < 1e-5 and furthest(kept, again, ".exp_avg") < 1e-6


def test_llm_weights_overrule_dtype_for_the_llm_alone(finetuning, quick_dev, tmp_path, monkeypatch):
    loaded, load = [], loading.load_llm
    monkeypatch.setattr(loading, "load_llm", lambda *a: (loaded.append(load(*a)), loaded[-1])[1])
    for i, more in enumerate(([], ["--llm-weights", "bf16"], ["--dtype", "bf16"],
                              ["--dtype", "bf16", "--llm-weights", "fp32"])):
        train(train_finetune, finetuning, tmp_path / f"run{i}", "--steps", "1", *more)
        tensors, _ = load_checkpoint(tmp_path / f"run{i}" / "last.safetensors")
        assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert [llm.dtype for llm in loaded] == [torch.float32, torch.bfloat16, torch.bfloat16, torch.float32]


def test_identical_prefixes_have_no_kl_in_a_bf16_run(finetuning, monkeypatch, tmp_path):
    """The student reads the demonstrations too, as embeddings in a padded prefix."""
    prefix = paper.held_out.one_prefix

    def padded(method, demos, limit, llm, distiller, formatter, args):
        if method == "icl":
            return prefix(method, demos, limit, llm, distiller, formatter, args)
        ids = torch.tensor([[0] * 7 + formatter.demonstrations(demos, limit)])
        return model.demo_prefix(llm, ids, torch.arange(ids.shape[1])[None] >= 7)
    monkeypatch.setattr(paper.held_out, "one_prefix", padded)
    train(train_finetune, finetuning, tmp_path / "run", "--steps", "1", "--dtype", "bf16")
    assert max(map(abs, metrics(tmp_path / "run", "dev_kl").values())) < 1e-6


def test_every_step_draws_new_samples(finetuning, quick_dev, tmp_path, monkeypatch):
    drawn, sample = [], data.sample_row
    monkeypatch.setattr(train_finetune, "sample_row", lambda tasks, formatter, seed, number, k, queries, _: (
        drawn.append((seed, number, k, queries)), sample(tasks, formatter, seed, number, k, queries))[1])
    read = rows_collated(train_finetune, monkeypatch)
    train(train_finetune, finetuning, tmp_path / "run")
    assert drawn == [(100, number, 4, 2) for number in range(256)]  # of 64 steps, sorted by length together
    assert len({id(row) for row in read}) == len(read) == 16


def test_prompt_tuning_lowers_the_answer_loss(finetuning, tmp_path, flags):
    """End to end: trained, evaluated on dev data, and read back by evaluate.py's method."""
    train(train_finetune, finetuning, tmp_path / "run", *PROMPT_TUNING, "--steps", "40", "--lr", "3e-2",
          "--batch-size", "4", "--grad-accum", "1", "--eval-every", "40")
    pred = list(metrics(tmp_path / "run", "pred").values())
    assert np.mean(pred[-5:]) < np.mean(pred[:3]) - 0.5 and not metrics(tmp_path / "run", "kl")
    tensors, state = load_checkpoint(tmp_path / "run")
    assert [(name, t.shape) for name, t in tensors.items()] == [("distiller.vectors", (4, 32))]
    assert without_hashes(state["trained_on"]) == {"finetune": FINETUNED | {"lam": 0.0}}
    assert state["best"] == min(metrics(tmp_path / "run", "dev_option_ce").values())
    flags = [flag for flag in flags if flag not in ("--distiller", "layers:2")]
    final = evaluate.main([*flags, "--methods", "prompt_tuning", "--checkpoint", str(tmp_path / "run"),
                           "--limit", "8", "--k", "4", "--out", str(tmp_path / "results.jsonl")])
    assert final["headline"]["prompt_tuning"]["mean"] > 0


def test_there_is_nothing_to_train_on_among_the_functions(finetuning, tmp_path):
    (tmp_path / "list_functions-c001").mkdir()
    (tmp_path / "list_functions-c001" / "list_functions-c001_16_100_test.jsonl").touch()
    with pytest.raises(UserError, match="--split functions has no meta-training tasks; give another one"):
        train_finetune.main([*finetuning, "--tasks", str(tmp_path), "--split", "functions"])


# Where finetuning starts from

@pytest.fixture
def pretrained(llama, llama_llm):
    """Writes a pretraining run of an untrained distiller under out/: (name, ...) -> folder."""
    def write(name: str, lost: float, seed: int, spec: str = "layers:2", distill_len: int = 4,
              start: str = "matched", stages=("pretrain",), llm_name: str = llama.name,
              objective: str | None = "kl", beta: float = 0.8) -> Path:
        module = build_distiller(spec, llama_llm, distill_len, start, seed)
        config = model_of(module, llama_llm, spec, start)
        about = {"run": name, "beta": beta} | ({"objective": objective} if objective else {})
        state = {"model": config | {"llm": config["llm"] | {"name": llm_name}},
                 "metrics": {"heldout_kl": seed * lost, "recovered": 1 - lost},
                 "trained_on": dict.fromkeys(stages, about)}
        save_checkpoint(common.OUT / name / "best.safetensors", module, state)
        return common.OUT / name
    return write


@pytest.fixture
def start_of(finetuning, tmp_path, monkeypatch, capsys):
    """Goes to the first step: (flags) -> the distiller's weights there, and what was printed."""
    def start(*more: str) -> tuple[dict, str]:
        weights = {}

        def stop(run):
            weights.update({name: t.clone() for name, t in run.distiller.state_dict().items()})
            raise KeyboardInterrupt
        monkeypatch.setattr(run.Run, "begin_step", stop)
        stub_dev(monkeypatch, train_finetune, [1.0])
        with pytest.raises(KeyboardInterrupt):
            train(train_finetune, finetuning, tmp_path / "run", *more)
        return weights, capsys.readouterr().out
    return start


def assert_starts_from(folder: Path, weights: dict) -> None:
    saved = load_checkpoint(folder)[0]
    assert saved.keys() == {f"distiller.{name}" for name in weights}
    assert all(torch.equal(saved[f"distiller.{name}"], t) for name, t in weights.items())


def test_default_start_is_the_best_fitting_pretraining_run(start_of, pretrained):
    pretrained("a", 0.5, seed=1)
    best = pretrained("b", 0.3, seed=2, objective=None)  # of before there was a choice
    for seed, other in enumerate(({"distill_len": 5}, {"spec": "layers:1"}, {"start": "plain"},
                                  {"llm_name": "another"}, {"stages": ("pretrain", "finetune")},
                                  {"objective": "clm"}, {"objective": "clm+kl"}, {"beta": 0.1}), 3):
        pretrained(f"other-{seed}", 0.1, seed, **other)
    pretrained("c", 0.4, seed=11)
    weights, out = start_of()
    assert_starts_from(best, weights)
    assert f"starting from the pretraining checkpoint {best / 'best.safetensors'}" in out


def test_a_damaged_run_under_out_is_no_traceback(start_of, pretrained):
    good = pretrained("good", 0.5, seed=1)
    (common.OUT / "damaged").mkdir()
    (common.OUT / "damaged" / "best.safetensors").write_bytes((good / "best.safetensors").read_bytes()[:-9])
    try:
        assert_starts_from(good, start_of()[0])
    except UserError as error:  # passed over or said plainly: both are fine
        assert "damaged" in str(error)


def test_a_given_start_is_used(start_of, pretrained):
    pretrained("better", 0.1, seed=1)
    given = pretrained("given", 0.9, seed=2)
    assert_starts_from(given, start_of("--init-from", str(given))[0])


@pytest.mark.parametrize("there", [False, True])
def test_without_pretraining_it_says_so_loudly(start_of, pretrained, llama_llm, there):
    """Where there is no run to start from; where there is one, only as --init-from none asks for it."""
    if there:
        pretrained("a", 0.1, seed=1)
    weights, out = start_of(*["--init-from", "none"] * there)
    own = build_distiller("layers:2", llama_llm, 4, "matched", 100).state_dict()
    assert all(torch.equal(own[name], t) for name, t in weights.items())
    if there:
        assert "checkpoint" not in out.lower()
    else:
        assert "NO PRETRAINING CHECKPOINT" in out and "train_pretrain.py" in out


@pytest.mark.parametrize("made_with, message", [
    ({"distill_len": 5}, "has --distill-len 5, and the flag is 4; give the former"),
    ({"spec": "layers:1"}, "has --distiller layers:1, and the flag is layers:2"),
    ({"start": "plain"}, "has --vector-start plain, and the flag is matched"),
    ({"llm_name": "another"}, "was trained for the LLM .*another")])
def test_a_start_that_does_not_fit(finetuning, pretrained, made_with, message):
    folder = pretrained("given", 0.5, seed=1, **made_with)
    with pytest.raises(UserError, match=message):
        train_finetune.main([*finetuning, "--init-from", str(folder)])


def test_resume_keeps_what_pretraining_was_seen(finetuning, quick_dev, tmp_path, pretrained):
    """A later, better pretraining run under out/ changes nothing for a run that is under way."""
    pretrained("pretrain-a", 0.5, seed=1)
    train(train_finetune, finetuning, tmp_path / "run", "--steps", "2")
    before, state = load_checkpoint(tmp_path / "run" / "last.safetensors")
    assert without_hashes(state["trained_on"]) == {
        "pretrain": {"run": "pretrain-a", "objective": "kl", "beta": 0.8}, "finetune": FINETUNED}
    pretrained("pretrain-b", 0.1, seed=2)
    train(train_finetune, finetuning, tmp_path / "run", "--steps", "2", "--resume")
    after, now = load_checkpoint(tmp_path / "run" / "last.safetensors")
    assert now["trained_on"] == state["trained_on"]
    assert all(torch.equal(before[name], t) for name, t in after.items())


def test_pretraining_then_finetuning(pretraining, finetuning, quick_dev, capsys):
    """The two stages as the quickstart runs them: the second finds what the first left."""
    first = train_pretrain.main(pretraining)
    train_finetune.main(finetuning)
    assert f"starting from the pretraining checkpoint {first['out_dir']}" in capsys.readouterr().out
    state = load_checkpoint(next(common.OUT.glob("finetune-*/last.safetensors")), weights=False)[1]
    assert state["trained_on"].keys() == {"pretrain", "finetune"}
