"""Tests of loading.py: names, folders and checkpoints become modules, or are refused with what to do."""

import copy
import json
import shutil

import pytest
import torch
from conftest import (
    CPU,
    close,
    demos,
    ids_maker,
    load,
    make_distiller,
    model_of,
    save_distiller,
    training_rows,
)
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, T5Config

import loading
from common import UserError
from data import collate
from loading import (
    build_distiller,
    first_layers,
    fuse_gelu,
    load_checkpoint,
    load_distiller,
    load_llm,
    max_positions,
)
from run import save_checkpoint
from sources import headers


def test_the_fused_gelu_is_gpt2s(gpt2):
    """Same logits and gradient as transformers' own, with fewer tensors kept for the backward pass."""
    found = {}
    for name in ("own", "fused"):
        llm = AutoModelForCausalLM.from_pretrained(gpt2).eval()
        if name == "fused":
            assert fuse_gelu(llm) is llm and not any("NewGELU" in type(m).__name__ for m in llm.modules())
        embeds, kept = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0)).requires_grad_(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: (kept.append(t), t)[1],
                                                      lambda t: t):
            logits = llm(inputs_embeds=embeds).logits
        logits.square().sum().backward()
        found[name] = logits.detach(), embeds.grad, len(kept)
    for own, fused in zip(found["own"][:2], found["fused"][:2], strict=True):
        torch.testing.assert_close(fused, own, atol=1e-4, rtol=1e-4)
    assert found["fused"][2] < found["own"][2]


def test_gpt2_is_loaded_with_the_fused_gelu(gpt2):
    llm = load(gpt2)
    for model in (llm, build_distiller("layers:2", llm, 4, "plain", 0),
                  build_distiller(str(gpt2), llm, 4, "plain", 0)):
        assert [m for m in model.modules() if "NewGELU" in type(m).__name__] == []
        assert any(isinstance(m, nn.GELU) for m in model.modules())


def test_the_first_layers_states_pass_the_llms_norm(llm):
    ids = torch.tensor([ids_maker(4)(11)])
    with torch.no_grad():
        hidden = llm(ids, output_hidden_states=True).hidden_states
        norm = llm.base_model.norm if llm.config.model_type == "llama" else llm.base_model.ln_f
        close(first_layers(llm, 2).eval()(ids).last_hidden_state, norm(hidden[2]))


def test_first_layers_are_a_trainable_fp32_copy(llm_folder):
    llm = load_llm(str(llm_folder), CPU, torch.bfloat16)
    before, backbone = copy.deepcopy(llm.state_dict()), first_layers(llm, 2)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in backbone.parameters())
    assert backbone.config.num_hidden_layers == 2 and llm.config.num_hidden_layers == 3
    with torch.no_grad():
        for p in backbone.parameters():
            p.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in llm.state_dict().items())


@pytest.mark.parametrize("spec, message", [
    ("layers:0", "layers:0.*has 3 layers.*layers:1 to layers:3"), ("layers:", "layers:: expected layers:N"),
    ("layers:99", "layers:99.*has 3 layers.*layers:1 to layers:3"),
    ("layers:-1", "layers:-1: expected layers:N"), ("layers:x", "layers:x: expected layers:N.*layers:6")])
def test_layer_counts_that_cannot_be_are_user_errors(llm, spec, message):
    with pytest.raises(UserError, match=message):
        make_distiller(llm, spec)


def test_load_llm_freezes_it_in_the_dtype_asked_for(llm_folder):
    llm = load_llm(str(llm_folder), CPU, torch.bfloat16)
    assert llm.dtype == torch.bfloat16 and not llm.training
    assert not any(p.requires_grad for p in llm.parameters())
    assert max_positions(llm.config) == (640 if llm.config.model_type == "gpt2" else 2048)


def test_load_llm_of_a_missing_folder_names_the_fix(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist; run `make assets`"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="./nowhere does not exist; run `make assets`"):
        load("./nowhere")


def test_load_llm_of_a_hub_name_without_a_hub_names_the_fix():
    for name in ("nobody/nothing-at-all", "no such/name/at all"):
        with pytest.raises(UserError, match="model hub, which does not answer.*make assets.*local folder"):
            load(name)


def test_load_llm_of_broken_files_names_the_fix(llm_folder, tmp_path):
    def broken(name, damage):
        folder = shutil.copytree(llm_folder, tmp_path / name)
        damage(folder)
        with pytest.raises(UserError, match=f"{name} cannot be loaded.*cut short, fetch it again"):
            load(folder)

    def cut(file):
        file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])

    broken("half-weights", lambda folder: cut(folder / "model.safetensors"))
    broken("empty-weights", lambda folder: (folder / "model.safetensors").write_bytes(b""))
    broken("half-config", lambda folder: cut(folder / "config.json"))
    broken("no-config", lambda folder: (folder / "config.json").unlink())
    broken("no-weights", lambda folder: (folder / "model.safetensors").unlink())


def test_load_llm_of_weights_that_do_not_fill_the_model_is_a_user_error(llm_folder, tmp_path):
    folder = shutil.copytree(llm_folder, tmp_path / "mixed")
    T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4).save_pretrained(folder)
    with pytest.raises(UserError,
                       match="mixed lacks weights of its own configuration, such as .*; give a whole model"):
        load(folder)


def write_gpt2(folder, **changes):
    """A GPT-2 of another shape than the fixture's, with the same vocabulary size unless changed."""
    config = {"vocab_size": 420, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 640} | changes
    torch.manual_seed(1)
    GPT2LMHeadModel(GPT2Config(**config, initializer_range=0.2, bos_token_id=0,
                               eos_token_id=0)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind, start", [
    ("layers:2", "matched"), ("layers:2", "plain"), ("layers:2", "residual"), ("narrow", "residual"),
    ("sibling", "matched"), ("narrow", "matched")])
def test_checkpoint_round_trip_gives_bitwise_equal_vectors(llm, llm_folder, tmp_path, kind, start):
    vocab = llm.config.vocab_size
    spec = {"sibling": str(llm_folder)}.get(kind, kind)
    if kind == "narrow":  # of another width: with a projection
        spec = str(write_gpt2(tmp_path / "narrow", n_embd=16, n_layer=1, n_head=2, vocab_size=vocab))
        copy_tokenizer(llm_folder, spec)
    distiller = make_distiller(llm, spec, start=start)
    torch.manual_seed(5)
    with torch.no_grad():
        for p in distiller.parameters():  # away from what building it again would give
            p.add_(0.05 * torch.randn_like(p))
    save_distiller(tmp_path / "run", distiller, llm, spec, start, step=7)
    state = json.loads(json.dumps({"model": model_of(distiller, llm, spec, start), "step": 7}))
    if kind == "narrow":
        shutil.rmtree(tmp_path / "narrow")  # the checkpoint is enough
    again, found = load_distiller(tmp_path / "run", llm)
    batch = collate(training_rows())
    with torch.no_grad():
        assert torch.equal(again.eval()(*demos(batch)),
                           distiller(*demos(batch)))
    assert found == state
    assert {n for n, p in again.named_parameters()
            if p.requires_grad} == {n for n, _ in distiller.named_parameters()}


def test_free_vectors_come_back_from_a_checkpoint(llm, tmp_path):
    free = build_distiller("free", llm, 4, "matched", 0)
    with torch.no_grad():
        free.vectors.add_(0.5)
    again, found = load_distiller(save_distiller(tmp_path / "run", free, llm, "free"), llm)
    assert torch.equal(again.vectors, free.vectors) and again.vectors.requires_grad
    assert found["model"]["backbone"] is None and found["model"]["distiller"] == "free"


@pytest.mark.parametrize("changes", [{"n_embd": 16}, {"vocab_size": 421}, {"n_layer": 2},
                                     {"folder": "other"}])
def test_load_distiller_for_another_llm_is_a_user_error(tmp_path, changes):
    llm = load(write_gpt2(tmp_path / "own" / "tiny"))
    save_distiller(tmp_path / "run", make_distiller(llm), llm)
    load_distiller(tmp_path / "run", load(shutil.copytree(tmp_path / "own" / "tiny",
                                                          tmp_path / "moved" / "tiny")))
    changes = dict(changes)
    other = load(write_gpt2(tmp_path / "another" / changes.pop("folder", "tiny"), **changes))
    with pytest.raises(UserError,
                       match="was trained for the LLM .*give its own --llm, or another checkpoint"):
        load_distiller(tmp_path / "run", other)


def copy_tokenizer(source, target):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / file, target)


def test_a_sibling_of_another_tokenizer_is_a_user_error_that_names_the_tokens(llm, llm_folder, tmp_path):
    sibling = write_gpt2(tmp_path / "sibling", n_layer=1, vocab_size=llm.config.vocab_size)
    copy_tokenizer(llm_folder, sibling)
    make_distiller(llm, str(sibling))
    spec = json.loads((sibling / "tokenizer.json").read_text())
    vocab = spec["model"]["vocab"]
    vocab["river?"] = vocab.pop("Ġriver")
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (sibling / "tokenizer.json").write_text(json.dumps(spec | {"model": spec["model"] | {"merges": []}}))
    with pytest.raises(UserError, match=(
            rf"4 tokens differ, such as 'a' \({vocab['b']} in the LLM's, {vocab['a']} in the distiller's\), "
            rf"'b' .*'river\?' \(not there in the LLM's, {vocab['river?']} in")):
        make_distiller(llm, str(sibling))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (sibling / file).unlink()
    with pytest.raises(UserError, match="does not share the tokenizer|has no tokenizer beside it"):
        make_distiller(llm, str(sibling))


def test_a_sibling_with_more_embedding_rows_than_tokens_is_welcome(llm, llm_folder, tmp_path):
    """Qwen2.5-0.5B and -7B share a tokenizer and pad their embeddings to different sizes."""
    sibling = write_gpt2(tmp_path / "sibling", n_layer=1, vocab_size=llm.config.vocab_size + 8)
    copy_tokenizer(llm_folder, sibling)
    batch = collate(training_rows())
    assert make_distiller(llm, str(sibling))(*demos(batch)).isfinite().all()


def test_a_sibling_that_is_broken_or_missing_is_a_user_error(llm, tmp_path):
    sibling = write_gpt2(tmp_path / "sibling", n_layer=1)
    (sibling / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="sibling cannot be loaded.*give layers:N"):
        make_distiller(llm, str(sibling))
    with pytest.raises(UserError, match="--distiller .*nowhere"):
        make_distiller(llm, str(tmp_path / "nowhere"))


KL, CLM, UNSEEN = {"objective": "kl"}, {"objective": "clm"}, {"tasks": "metaicl", "split": "class_to_class"}
FREE = "holds free vectors .*evaluate it with --methods prompt_tuning"
WITH = "holds .* was trained with L_distill; evaluate it with --methods mend"
WITHOUT = "holds .* was trained without L_distill; evaluate it with --methods hypertuning"


@pytest.mark.parametrize("method, distiller, stages, message", [
    ("prompt_tuning", "layers:2", {}, "holds a distiller that was trained with L_distill"),
    ("mend", "free", {}, FREE),
    ("hypertuning", "free", {}, FREE),
    ("hypertuning", "layers:2", {"pretrain": KL, "finetune": UNSEEN | {"lam": 0.0}}, WITH),
    ("hypertuning", "layers:2", {"pretrain": CLM, "finetune": UNSEEN | {"lam": 0.1}}, WITH),
    ("hypertuning", "layers:2", {"pretrain": {"objective": "clm+kl"}}, WITH),
    ("hypertuning", "layers:2", {"pretrain": {"corpus": "c4"}}, WITH),  # before there was a choice
    ("mend", "layers:2", {"pretrain": CLM, "finetune": UNSEEN | {"lam": 0.0}}, WITHOUT),
    ("mend", "layers:2", {"finetune": UNSEEN | {"lam": 0.0}}, WITHOUT),
    ("hypertuning", "layers:2", {"pretrain": CLM, "finetune": UNSEEN | {"lam": 0.0}}, None),
    ("hypertuning", "layers:2", {"finetune": UNSEEN | {"lam": 0.0}}, None),
    ("mend", "layers:2", {"pretrain": KL}, None),
    ("mend", "layers:2", {"pretrain": CLM, "finetune": UNSEEN | {"lam": 1.0}}, None),  # Table 4's row CLM
    ("mend", "layers:2", {"pretrain": KL, "finetune": UNSEEN | {"lam": 0.0}}, None),   # and w/o L_distill
    ("mend", "layers:2", {"finetune": UNSEEN}, None), ("mend", "layers:2", {"pretrain": {"corpus": "c4"}},
                                                       None)])
def test_a_checkpoint_is_not_taken_for_another_methods(method, distiller, stages, message):
    state = {"model": {"distiller": distiller}, "trained_on": stages}
    if message is None:
        return headers.refuse_wrong_method([method], state, "run")
    with pytest.raises(UserError, match=f"run {message}"):
        headers.refuse_wrong_method([method], state, "run")


def test_tasks_that_the_checkpoint_was_finetuned_on_are_refused(tiny_tasks):
    def refuse(tasks: str, split: str) -> None:
        loading.refuse_seen_tasks({"finetune": {"tasks": tasks, "split": split}}, tiny_tasks)
    refuse("metaicl", "class_to_class")
    refuse("bigbench", "hr_to_lr")
    refuse("functions metaicl", "functions")  # made tasks trained on; a split without meta-training tasks
    with pytest.raises(UserError, match="training tasks include ag_news, emo"):
        refuse("metaicl", "hr_to_lr")


def test_metrics_under_their_former_name(tmp_path):
    save_checkpoint(tmp_path / "old.safetensors", torch.nn.Linear(1, 1), {"figures": {"dev_kl": 0.5}})
    _, state = load_checkpoint(tmp_path / "old.safetensors")
    assert state["metrics"] == {"dev_kl": 0.5} and "figures" not in state
