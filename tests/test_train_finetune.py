"""Tests of train_finetune.py, through main(argv): Eq. (4) by autograd, where it starts from, stop and resume."""

import contextlib
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train_pretrain import assert_same, furthest, interrupt_after, log_softmaxes, metrics

import common
import data
import evaluate
import loading
import model
import run
import score
import train_finetune
import train_pretrain
from common import UserError
from data import Encoder, sample_row, step_rows
from loading import build_distiller, distiller_config, load_llm
from run import load_checkpoint, save_checkpoint
from sources.tasks import load_tasks
from sources.text import Tokenizer

CPU = torch.device("cpu")

FINETUNED = {"tasks": "metaicl", "split": "class_to_class", "lam": 1.0, "pred_weight": 1.0}


@pytest.fixture
def argv(flags) -> list[str]:
    return [*flags, "--vector-start", "matched", "--k", "4", "--batch-size", "2", "--grad-accum", "2", "--queries-per-demo", "2", "--steps", "4",
            "--eval-every", "2", "--lr", "1e-3", "--init-from", "none"]


@pytest.fixture
def quick_dev(monkeypatch):
    monkeypatch.setattr(train_finetune, "dev_figures",
                        lambda *_: dict.fromkeys(("val_option_ce", "val_pred", "val_kl", "dev_headline"), 1))


@pytest.fixture
def pretrained(argv, llama):
    """Writes a pretraining run of an untrained distiller under out/, told apart by its seed: (name, ...) -> folder."""
    llm = load_llm(str(llama), CPU, torch.float32)

    def write(name: str, val_kl: float, seed: int, distiller: str = "layers:2", distill_len: int = 4,
              start: str = "matched", trained_on=("pretrain",), llm_name: str = llama.name,
              objective: str | None = "kl") -> Path:
        class Flags:
            template = "space"
        Flags.distiller, Flags.distill_len, Flags.vector_start = distiller, distill_len, start
        module = build_distiller(distiller, llm, distill_len, start, seed)
        config = distiller_config(module, llm, Flags)
        config["llm"] = config["llm"] | {"name": llm_name}
        state = {"model": config, "figures": {"val_kl": val_kl},
                 "trained_on": {s: {"run": name} | ({"objective": objective} if objective else {}) for s in trained_on}}
        save_checkpoint(common.OUT / name / "best.safetensors", module, state)
        return common.OUT / name
    return write


def test_end_to_end(argv, tmp_path, capsys):
    final = train_finetune.main([*argv, "--out-dir", str(tmp_path / "run"), "--lam", "0.1"])
    assert final.keys() == {"stage", "split", "steps", "best_option_ce", "val_option_ce", "val_pred",
                            "val_kl", "val_clm", "dev_headline", "out_dir"}
    assert (final["stage"], final["split"], final["steps"]) == ("finetune", "class_to_class", 4)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == final
    for key, steps in (("pred", [1, 2, 3, 4]), ("kl", [1, 2, 3, 4]), ("val_pred", [0, 2, 4]),
                       ("val_kl", [0, 2, 4])):
        assert list(metrics(tmp_path / "run", key)) == steps
    state = load_checkpoint(tmp_path / "run" / "last.safetensors", weights=False)[1]
    assert state["trained_on"] == {"finetune": FINETUNED | {"lam": 0.1}}
    option_ce = metrics(tmp_path / "run", "val_option_ce")
    assert state["best"] == final["best_option_ce"] == min(option_ce.values()) and len(option_ce) == 3


def test_default_folder_is_named_after_llm_and_split(argv, quick_dev, llama):
    assert Path(train_finetune.main([*argv, "--steps", "1"])["out_dir"]) == \
        common.OUT / f"finetune-{llama.name}-class_to_class"


@pytest.mark.parametrize("lam, pred_weight", [(0.0, 1.0), (0.5, 1.0), (0.5, 0.0)])
@pytest.mark.parametrize("template", ["space", "newline"])
def test_the_first_step_is_eq_4_on_the_whole_step(argv, quick_dev, tmp_path, llama, tasks_dir, lam, pred_weight, template):
    """Losses and gradient norm of step 1, from one query at a time, full logits and autograd."""
    train_finetune.main([*argv, "--steps", "1", "--lam", str(lam), "--pred-weight", str(pred_weight), "--template", template,
                         "--out-dir", str(tmp_path / "run")])
    llm = load_llm(str(llama), CPU, torch.float32)
    distiller = build_distiller("layers:2", llm, 4, "matched", 100)
    encoder = Encoder(Tokenizer(str(llama)), template, 450, 4, 2048, 2048)
    tasks = load_tasks(str(tasks_dir), "class_to_class")
    pred, kl, answers, tokens = 0, 0, 0, 0
    rows = step_rows(lambda _, n: [sample_row(tasks, encoder, 100, i, 4, 2) for i in range(n)], 100, 4)(0)
    for row in rows:
        demo = torch.tensor([row["demo"]])
        vectors = distiller(demo, torch.ones_like(demo, dtype=torch.bool))
        assert len(row["queries"]) == 2
        for x, (y,) in row["queries"]:
            student = log_softmaxes(llm, vectors, x + y)
            teacher = log_softmaxes(llm, llm.get_input_embeddings()(demo), x + y).detach()
            kl = kl + (teacher.exp() * (teacher - student)).sum()
            pred = pred - student[range(len(x), len(x + y)), y].sum()
            answers, tokens = answers + len(y), tokens + len(x + y)
    pred, kl = pred / answers, kl / tokens
    (pred_weight * pred + lam * kl).backward()
    norm = torch.stack([p.grad.norm() for p in distiller.parameters() if p.grad is not None]).norm().item()
    expected = {"grad_norm": norm, "tokens": tokens} | ({"pred": pred.item()} if pred_weight else {}) | ({"kl": kl.item()} if lam else {})
    assert {key: metrics(tmp_path / "run", key)[1] for key in expected} == pytest.approx(expected, rel=1e-3)
    assert all(not metrics(tmp_path / "run", key) for key in {"pred", "kl"} - expected.keys())


def test_two_micro_batches_equal_one_large_batch(argv, quick_dev, tmp_path):
    argv = [*argv, "--lr", "2e-4"]  # Adam divides by the gradient's size, so it enlarges rounding where that is near zero
    for name, size in (("two", ["--batch-size", "2", "--grad-accum", "2"]), ("one", ["--batch-size", "4", "--grad-accum", "1"]),
                       ("other", ["--batch-size", "3", "--grad-accum", "1"])):
        train_finetune.main([*argv, *size, "--out-dir", str(tmp_path / name)])
    two, one, other = (load_checkpoint(tmp_path / name / "last.safetensors")[0] for name in ("two", "one", "other"))
    assert furthest(two, one, "distiller.") < 1e-5 and furthest(two, one, ".exp_avg") < 1e-6
    assert furthest(other, one, "distiller.") > 1e-4 and furthest(other, one, ".exp_avg") > 1e-4


def test_checkpointing_the_llm_changes_no_step(argv, quick_dev, tmp_path):
    argv = [*argv, "--lr", "2e-4"]
    for name, flag in (("kept", []), ("again", ["--grad-checkpoint"])):
        train_finetune.main([*argv, *flag, "--out-dir", str(tmp_path / name)])
    kept, again = (load_checkpoint(tmp_path / name / "last.safetensors")[0] for name in ("kept", "again"))
    assert furthest(kept, again, "distiller.") < 1e-5 and furthest(kept, again, ".exp_avg") < 1e-6


def test_llm_weights_overrule_dtype_for_the_llm_alone(argv, quick_dev, tmp_path, monkeypatch):
    loaded, load = [], loading.load_llm
    monkeypatch.setattr(train_finetune, "load_llm", lambda *a: (loaded.append(load(*a)), loaded[-1])[1])
    for flags in ([], ["--llm-weights", "bf16"], ["--dtype", "bf16"], ["--dtype", "bf16", "--llm-weights", "fp32"]):
        train_finetune.main([*argv, "--steps", "1", *flags, "--out-dir", str(tmp_path / "-".join(["run", *flags]))])
    assert [llm.dtype for llm in loaded] == [torch.float32, torch.bfloat16, torch.bfloat16, torch.float32]
    for folder in tmp_path.glob("run*"):
        tensors, _ = load_checkpoint(folder / "last.safetensors")
        assert {t.dtype for t in tensors.values()} == {torch.float32}


def test_every_step_draws_new_samples(argv, quick_dev, tmp_path, monkeypatch):
    drawn, sample = [], data.sample_row
    monkeypatch.setattr(train_finetune, "sample_row", lambda tasks, encoder, seed, number, k, queries, least_k: (
        drawn.append((seed, number, k, queries)), sample(tasks, encoder, seed, number, k, queries))[1])
    read, collate = [], data.collate
    monkeypatch.setattr(train_finetune, "collate", lambda rows, device: (read.extend(rows), collate(rows, device))[1])
    train_finetune.main([*argv, "--out-dir", str(tmp_path / "run")])
    assert drawn == [(100, number, 4, 2) for number in range(256)]  # of 64 steps, sorted by length together
    assert len({id(row) for row in read}) == len(read) == 16


def test_without_lambda_the_distillation_loss_has_no_part(argv, quick_dev, tmp_path, monkeypatch):
    loss = score.distill_loss
    for factor in (1, 7):
        monkeypatch.setattr(train_finetune, "distill_loss", lambda *a, factor=factor: factor * loss(*a))
        for lam in ("0", "1"):
            train_finetune.main([*argv, "--lam", lam, "--out-dir", str(tmp_path / f"{lam}-{factor}")])
    tensors = {name: load_checkpoint(tmp_path / name / "last.safetensors")[0] for name in ("0-1", "0-7", "1-1", "1-7")}
    changed = {lam: [n for n, t in tensors[f"{lam}-1"].items() if not torch.equal(t, tensors[f"{lam}-7"][n])] for lam in "01"}
    assert changed["0"] == [] and changed["1"]


def test_finetuning_lowers_the_answer_loss(argv, quick_dev, tmp_path):
    argv = [*argv, "--steps", "60", "--lr", "1e-2", "--batch-size", "4", "--grad-accum", "1", "--eval-every", "60"]
    train_finetune.main([*argv, "--out-dir", str(tmp_path / "run")])
    pred = list(metrics(tmp_path / "run", "pred").values())
    assert np.mean(pred[-5:]) < np.mean(pred[:3]) - 0.5


def test_without_lambda_the_teacher_does_not_run(argv, quick_dev, tmp_path, monkeypatch):
    calls, prefix = [], model.demo_prefix
    monkeypatch.setattr(model, "demo_prefix", lambda *a: calls.append(1) or prefix(*a))
    counts = {}
    for lam in ("0", "1"):
        train_finetune.main([*argv, "--lam", lam, "--out-dir", str(tmp_path / lam)])
        counts[lam] = len(calls)
    assert counts == {"0": 0, "1": 8}  # four steps of two micro-batches


PROMPT_TUNING = ["--distiller", "free", "--lam", "0"]


def test_prompt_tuning_lowers_the_answer_loss(argv, tmp_path):
    """End to end: trained, evaluated on dev data, and read back by evaluate.py's method."""
    argv = [*argv, *PROMPT_TUNING, "--steps", "40", "--lr", "3e-2", "--batch-size", "4", "--grad-accum", "1", "--eval-every", "40"]
    train_finetune.main([*argv, "--out-dir", str(tmp_path / "run")])
    pred = list(metrics(tmp_path / "run", "pred").values())
    assert np.mean(pred[-5:]) < np.mean(pred[:3]) - 0.5 and not metrics(tmp_path / "run", "kl")
    tensors, state = load_checkpoint(tmp_path / "run")
    assert [(name, t.shape) for name, t in tensors.items()] == [("distiller.vectors", (4, 32))]
    assert state["trained_on"] == {"finetune": FINETUNED | {"lam": 0.0}}
    assert state["best"] == min(metrics(tmp_path / "run", "val_option_ce").values())
    flags = [flag for flag in argv[:argv.index("--batch-size")]
             if flag not in ("--distiller", "layers:2", "--vector-start", "matched")]
    final = evaluate.main([*flags, "--methods", "prompt_tuning", "--checkpoint", str(tmp_path / "run"), "--limit", "8", "--k", "4",
                           "--out", str(tmp_path / "results.jsonl")])
    assert final["headline"]["prompt_tuning"]["mean"] > 0


def test_an_interrupted_prompt_tuning_run_equals_one_that_was_not(argv, tmp_path, monkeypatch):
    argv = [*argv, *PROMPT_TUNING, "--save-every", "1"]
    train_finetune.main([*argv, "--out-dir", str(tmp_path / "whole")])
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train_finetune.main([*argv, "--out-dir", str(tmp_path / "cut")])
    train_finetune.main([*argv, "--out-dir", str(tmp_path / "cut"), "--resume"])
    whole, cut = (load_checkpoint(tmp_path / name / "last.safetensors") for name in ("whole", "cut"))
    assert whole[0].keys() == cut[0].keys() and len(whole[0]) == 4  # the vectors and Adam's two moments and step
    assert all(torch.equal(cut[0][name], t) for name, t in whole[0].items())
    assert {**whole[1], "flags": 0} == {**cut[1], "flags": 0}


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # gpt2 has dropout, which must be drawn again alike
def test_a_run_that_was_interrupted_equals_one_that_was_not(argv, request, tmp_path, monkeypatch, family):
    argv = [*argv, "--llm", str(request.getfixturevalue(family)), "--save-every", "1"]
    train_finetune.main([*argv, "--out-dir", str(tmp_path / "whole")])
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train_finetune.main([*argv, "--out-dir", str(tmp_path / "cut")])
    assert load_checkpoint(tmp_path / "cut" / "last.safetensors", weights=False)[1]["step"] == 2
    train_finetune.main([*argv, "--out-dir", str(tmp_path / "cut"), "--resume"])
    assert_same(tmp_path / "whole", tmp_path / "cut")
    assert_same(tmp_path / "whole", tmp_path / "cut", "best.safetensors")
    for key in ("pred", "kl", "grad_norm", "val_pred", "dev_headline"):
        assert metrics(tmp_path / "cut", key) == metrics(tmp_path / "whole", key)


def test_resume_keeps_what_pretraining_was_seen(argv, quick_dev, tmp_path, pretrained):
    """A later, better pretraining run under out/ changes nothing for a run that is under way."""
    argv = [flag for flag in argv if flag not in ("--init-from", "none")] + ["--save-every", "1", "--out-dir", str(tmp_path / "run")]
    pretrained("pretrain-a", 0.5, seed=1)
    train_finetune.main([*argv, "--steps", "2"])
    before = load_checkpoint(tmp_path / "run" / "last.safetensors")
    pretrained("pretrain-b", 0.1, seed=2)
    train_finetune.main([*argv, "--steps", "2", "--resume"])
    after = load_checkpoint(tmp_path / "run" / "last.safetensors")
    assert before[1]["trained_on"] == after[1]["trained_on"]
    assert after[1]["trained_on"] == {"pretrain": {"run": "pretrain-a", "objective": "kl"}, "finetune": FINETUNED}
    assert all(torch.equal(before[0][name], t) for name, t in after[0].items())


def stub_dev(monkeypatch, values: list[float], seen: list) -> None:
    feed = iter(values)

    def figures(llm, distiller, *_):
        seen.append({name: t.clone() for name, t in distiller.state_dict().items()})
        losses = dict.fromkeys(("val_pred", "val_kl", "dev_headline"), 9.0 - len(seen))
        return losses | {"val_option_ce": next(feed)}
    monkeypatch.setattr(train_finetune, "dev_figures", figures)


@pytest.mark.parametrize("values, best_step", [([5.0, 3.0, 1.0, 2.0, 4.0], 2), ([1.0, 3.0, 2.0, 2.0, 2], 0)])
def test_best_is_the_checkpoint_with_the_lowest_option_ce(argv, tmp_path, monkeypatch, values, best_step):
    """Not the one with the lowest losses, which fall all the way; and it may be the start."""
    seen = []
    stub_dev(monkeypatch, values, seen)
    train_finetune.main([*argv, "--eval-every", "1", "--out-dir", str(tmp_path / "run")])
    best, state = load_checkpoint(tmp_path / "run")
    assert state["step"] == best_step
    assert all(torch.equal(best[f"distiller.{name}"], t) for name, t in seen[best_step].items())


@pytest.mark.parametrize("script", [train_finetune, train_pretrain], ids=lambda s: s.__name__)
def test_the_start_is_evaluated_once(argv, flags, corpus_dir, quick_dev, monkeypatch, tmp_path, script):
    """Before the first step, with the distiller as it starts, and not again in a run that goes on."""
    if script is train_pretrain:
        argv = [*flags, "--corpus", str(corpus_dir), "--window", "48", "--batch-size", "2"]
    calls, names = [], ("val_option_ce", "val_pred", "val_kl", "val_clm", "dev_headline")

    def dev(llm, distiller, *_):
        calls.append(sum(p.sum().item() for p in distiller.parameters()))
        return dict.fromkeys(names, 1.0)
    monkeypatch.setattr(script, "dev_figures", dev)
    argv = [*argv, "--eval-every", "9", "--out-dir", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "begin_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            script.main([*argv, "--steps", "2"])
    assert len(calls) == 1 and list(metrics(tmp_path / "run", "val_kl")) == [0]
    script.main([*argv, "--steps", "2", "--resume"])
    assert len(calls) == 2 and calls[0] != calls[1] and list(metrics(tmp_path / "run", "val_kl")) == [0, 2]


@pytest.fixture
def rounded_llm(llama, tmp_path) -> Path:
    """The tiny LLM with weights that bf16 holds exactly."""
    folder = tmp_path / "models" / llama.name
    shutil.copytree(llama, folder)
    llm = load_llm(str(llama), CPU, torch.float32)
    llm.to(torch.bfloat16).float().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("script", [train_finetune, train_pretrain], ids=lambda s: s.__name__)
def test_a_bf16_run_is_evaluated_in_fp32(argv, flags, corpus_dir, rounded_llm, monkeypatch, tmp_path, script):
    """The figures of the start equal those of an fp32 run on the same weights; those of bf16 are far from
    them."""
    if script is train_pretrain:
        argv = [*flags, "--corpus", str(corpus_dir), "--window", "96", "--batch-size", "2"]
    start = {}
    for dtype, exact in (("fp32", True), ("bf16", True), ("bf16", False)):
        if not exact:
            monkeypatch.setattr(script, "full_precision", lambda llm: contextlib.nullcontext())
        run = tmp_path / f"{dtype}-{exact}"
        script.main([*argv, "--llm", str(rounded_llm), "--steps", "1", "--dtype", dtype,
                     "--out-dir", str(run)])
        start[dtype, exact] = {key: metrics(run, key)[0] for key in ("val_kl", "val_option_ce")}
    assert start["bf16", True] == pytest.approx(start["fp32", True], rel=1e-5)
    assert start["bf16", False] != pytest.approx(start["fp32", True], rel=1e-4)


def test_identical_prefixes_have_no_kl_in_a_bf16_run(argv, monkeypatch, tmp_path):
    """The student reads the demonstrations too, but as embeddings in a padded prefix, as rounding would
    tell."""
    prefix = score.one_prefix

    def padded(method, demos, limit, llm, distiller, encoder, args):
        if method == "icl":
            return prefix(method, demos, limit, llm, distiller, encoder, args)
        ids = torch.tensor([[0] * 7 + encoder.demonstrations(demos, limit)])
        return model.demo_prefix(llm, ids, torch.arange(ids.shape[1])[None] >= 7)
    monkeypatch.setattr(score, "one_prefix", padded)
    train_finetune.main([*argv, "--steps", "1", "--dtype", "bf16", "--out-dir", str(tmp_path / "run")])
    assert max(map(abs, metrics(tmp_path / "run", "val_kl").values())) < 1e-6


@pytest.mark.parametrize("patience, steps", [("1", 2), ("2", 3), ("0", 4)])
def test_early_stopping(argv, tmp_path, monkeypatch, patience, steps):
    stub_dev(monkeypatch, [9.0, 1.0, 2.0, 3.0, 4.0], [])
    argv = [*argv, "--eval-every", "1", "--patience", patience, "--out-dir", str(tmp_path / "run")]
    assert train_finetune.main(argv)["steps"] == steps
    assert load_checkpoint(tmp_path / "run" / "best.safetensors", weights=False)[1]["step"] == 1


# Where it starts from


def start_of(argv, tmp_path, monkeypatch, capsys) -> tuple[dict, str]:
    """The distiller's weights before the first step, and what was printed."""
    weights = {}

    def stop(run):
        weights.update({name: t.clone() for name, t in run.distiller.state_dict().items()})
        raise KeyboardInterrupt
    monkeypatch.setattr(run.Run, "begin_step", stop)
    stub_dev(monkeypatch, [1.0], [])
    with pytest.raises(KeyboardInterrupt):
        train_finetune.main([*argv, "--out-dir", str(tmp_path / "run")])
    return weights, capsys.readouterr().out


def assert_starts_from(folder: Path, weights: dict) -> None:
    saved = load_checkpoint(folder)[0]
    assert saved.keys() == {f"distiller.{name}" for name in weights}
    assert all(torch.equal(saved[f"distiller.{name}"], t) for name, t in weights.items())


def test_default_start_is_the_best_fitting_pretraining_run(argv, tmp_path, monkeypatch, capsys, pretrained):
    pretrained("a", 0.5, seed=1)
    best = pretrained("b", 0.3, seed=2, objective=None)  # of before there was a choice
    pretrained("c", 0.4, seed=3)
    pretrained("other-length", 0.1, seed=4, distill_len=5)
    pretrained("other-depth", 0.1, seed=5, distiller="layers:1")
    pretrained("other-scale", 0.1, seed=6, start="plain")
    pretrained("other-llm", 0.1, seed=7, llm_name="another")
    pretrained("finetuned", 0.1, seed=8, trained_on=("pretrain", "finetune"))
    pretrained("clm", 0.1, seed=9, objective="clm")
    pretrained("both", 0.1, seed=10, objective="clm+kl")
    weights, out = start_of([flag for flag in argv if flag not in ("--init-from", "none")], tmp_path, monkeypatch, capsys)
    assert_starts_from(best, weights)
    assert f"starting from the pretraining checkpoint {best / 'best.safetensors'}" in out


def test_a_damaged_run_under_out_is_no_traceback(argv, tmp_path, monkeypatch, capsys, pretrained):
    good = pretrained("good", 0.5, seed=1)
    (common.OUT / "damaged").mkdir()
    (common.OUT / "damaged" / "best.safetensors").write_bytes((good / "best.safetensors").read_bytes()[:-9])
    try:
        weights, _ = start_of([flag for flag in argv if flag not in ("--init-from", "none")], tmp_path, monkeypatch, capsys)
        assert_starts_from(good, weights)
    except UserError as error:  # passed over or said plainly: both are fine
        assert "damaged" in str(error)


def test_a_given_start_is_used(argv, tmp_path, monkeypatch, capsys, pretrained):
    pretrained("better", 0.1, seed=1)
    given = pretrained("given", 0.9, seed=2)
    weights, _ = start_of([*argv, "--init-from", str(given)], tmp_path, monkeypatch, capsys)
    assert_starts_from(given, weights)


def test_without_any_pretraining_run_it_says_so_loudly(argv, tmp_path, monkeypatch, capsys, llama):
    weights, out = start_of([flag for flag in argv if flag not in ("--init-from", "none")], tmp_path, monkeypatch, capsys)
    assert "NO PRETRAINING CHECKPOINT" in out and "train_pretrain.py" in out
    own = build_distiller("layers:2", load_llm(str(llama), CPU, torch.float32), 4, "matched", 100).state_dict()
    assert all(torch.equal(own[name], t) for name, t in weights.items())


def test_init_from_none_ignores_pretraining_runs(argv, tmp_path, monkeypatch, capsys, pretrained, llama):
    pretrained("a", 0.1, seed=1)
    weights, out = start_of(argv, tmp_path, monkeypatch, capsys)
    own = build_distiller("layers:2", load_llm(str(llama), CPU, torch.float32), 4, "matched", 100).state_dict()
    assert all(torch.equal(own[name], t) for name, t in weights.items())
    assert "checkpoint" not in out.lower()


def test_pretraining_then_finetuning(argv, quick_dev, flags, corpus_dir, monkeypatch, capsys):
    """The two stages as the quickstart runs them: the second finds what the first left."""
    names = ("val_option_ce", "val_kl", "val_clm")
    monkeypatch.setattr(train_pretrain, "dev_figures", lambda *_: dict.fromkeys(names, 1.0))
    first = train_pretrain.main([*flags, "--corpus", str(corpus_dir), "--window", "48", "--batch-size", "2", "--steps", "2",
                                 "--eval-docs", "3", "--vector-start", "matched"])
    train_finetune.main([flag for flag in argv if flag not in ("--init-from", "none")])
    assert f"starting from the pretraining checkpoint {first['out_dir']}" in capsys.readouterr().out
    state = load_checkpoint(next(common.OUT.glob("finetune-*/last.safetensors")), weights=False)[1]
    assert state["trained_on"].keys() == {"pretrain", "finetune"}


def test_there_is_nothing_to_train_on_among_the_functions(argv, tasks_dir, tmp_path):
    folder = tmp_path / "list_functions-c001"
    folder.mkdir()
    (folder / "list_functions-c001_16_100_test.jsonl").write_text("")
    with pytest.raises(UserError, match="--split functions has no meta-training tasks; give another one"):
        train_finetune.main([*argv, "--tasks", str(tmp_path), "--split", "functions"])


@pytest.mark.parametrize("made_with, message", [
    ({"distill_len": 5}, "has --distill-len 5, and the flag is 4; give the former"),
    ({"distiller": "layers:1"}, "has --distiller layers:1, and the flag is layers:2"),
    ({"start": "plain"}, "has --vector-start plain, and the flag is matched"),
    ({"llm_name": "another"}, "was trained for the LLM .*another")])
def test_a_start_that_does_not_fit(argv, pretrained, made_with, message):
    folder = pretrained("given", 0.5, seed=1, **made_with)
    with pytest.raises(UserError, match=message):
        train_finetune.main([*argv, "--init-from", str(folder)])


# Errors


def test_an_existing_run_needs_resume(argv, quick_dev, tmp_path):
    argv = [*argv, "--steps", "1", "--out-dir", str(tmp_path / "run")]
    train_finetune.main(argv)
    with pytest.raises(UserError, match="holds a run already; add --resume"):
        train_finetune.main(argv)


def test_flag_faults_come_together(argv):
    faults = {"--lam": "-1", "--queries-per-demo": "0", "--context-len": "255", "--lr": "0", "--steps": "0", "--k": "0"}
    with pytest.raises(UserError) as error:
        train_finetune.main([*argv, *itertools.chain(*faults.items())])
    assert [flag for flag in faults if f"{flag} is " not in str(error.value)] == []


@pytest.mark.parametrize("change, message", [
    (["--k", "59"], "task .* has [0-9]+ different examples, and --k 59 with --queries-per-demo 2 needs 61"),
    (["--lam", "0", "--pred-weight", "0"], "--lam and --pred-weight are both 0, so there is no loss"),
    (["--pred-weight", "-1"], "--pred-weight is -1.0"), (["--distiller", "free"], "add --init-from none --lam 0"),
    (["--distiller", "free", "--lam", "0", "--init-from", "/nowhere"], "add --init-from none --lam 0"),
    (["--init-from", "/nowhere"], "no checkpoint at /nowhere"), (["--split", "qa_to_qa"], "of qa_to_qa"),
    (["--tasks", "/nowhere"], "--tasks /nowhere"), (["--distiller", "layers:x"], "whole number N")])
def test_user_errors_come_before_the_first_step(argv, monkeypatch, change, message):
    monkeypatch.setattr(run.Run, "begin_step", lambda *_: pytest.fail("a step was made"))
    with pytest.raises(UserError, match=message):
        train_finetune.main([*argv, *change])


@pytest.mark.parametrize("name", ["pred_loss", "distill_loss"])
def test_a_loss_that_is_not_finite_stops_and_names_the_step(argv, quick_dev, tmp_path, monkeypatch, name):
    loss, calls = getattr(train_finetune, name), []

    def breaks(*a):
        calls.append(1)
        return loss(*a) * (float("inf") if len(calls) == 4 else 1)  # the second micro-batch of the second step
    monkeypatch.setattr(train_finetune, name, breaks)
    with pytest.raises(UserError, match="the loss at step 1 is inf; lower --lr"):
        train_finetune.main([*argv, "--eval-every", "4", "--save-every", "1", "--out-dir", str(tmp_path / "run")])
    tensors, state = load_checkpoint(tmp_path / "run" / "last.safetensors")
    assert state["step"] == 1 and all(t.isfinite().all() for t in tensors.values())


def test_user_errors_end_with_code_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        common.run_main(lambda: train_finetune.main([*argv, "--lam", "-2"]))
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.err.startswith("error: --lam is -2") and "Traceback" not in captured.err
