"""Tests of distill.py --export: what other programs make of it against plain passes over [BOS ; S_D ; x]."""

import json
import re
import shutil

import pytest
import torch
from conftest import load, save_distiller, write_lines
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    Gemma3TextConfig,
    MistralConfig,
    OPTConfig,
    T5Config,
    T5ForConditionalGeneration,
)

import common
import distill
import plain
from data import Formatter
from loading import build_distiller
from serving.pretrained import Distiller
from serving.vectors import EXPORTS
from serving.writer import Writer
from sources.text import Tokenizer

STATE = {"trained_on": {}, "step": 3, "metrics": {}, "commit": "abc", "flags": {}}
PAIRS = [("the boat is green", "hills"), ("war", "trade and law"), ("bread", "music")]
ASKED = ["the river is cold", "rain"]
BOS = 7


@pytest.fixture(params=["", "bos"])
def folder(llm_folder, request, tmp_path):
    """An LLM whose tokenizer begins a text with a BOS, or not."""
    if not request.param:
        return llm_folder
    shutil.copytree(llm_folder, tmp_path / "llm")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llm")
    tokenizer.bos_token = token = tokenizer.convert_ids_to_tokens(BOS)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, BOS)])
    tokenizer.save_pretrained(tmp_path / "llm")
    assert Tokenizer(str(tmp_path / "llm")).bos == [BOS]
    return tmp_path / "llm"


@pytest.fixture
def made(folder, tmp_path):
    """(llm, formatter, vectors, a function that exports them), of an input-vector distiller, l = 4."""
    llm = load(folder)
    run = save_distiller(tmp_path / "run", build_distiller("layers:2", llm, 4, "matched", 1), llm, **STATE)
    demos = write_lines(tmp_path / "demos.jsonl", [{"input": x, "output": y} for x, y in PAIRS])
    argv = ["--llm", str(folder), "--device", "cpu", "--dtype", "fp32"]
    kept = str(tmp_path / "v.safetensors")
    distill.main([*argv, "--checkpoint", str(run), "--demos", demos, "--out", kept])

    def export(kind: str, *more: str):
        out = tmp_path / kind
        distill.main([*argv, "--vectors", kept, "--export", kind, "--out", str(out), *more])
        return out

    return llm, Formatter(Tokenizer(str(folder)), "space", 900), load_file(kept)["vectors"], export


@torch.no_grad()
def expected_logits(llm, formatter, vectors, ids: list[int]) -> torch.Tensor:
    """(T_x, V), of the tokens after each of x's."""
    prefix = torch.cat([plain.embed(llm, formatter.turns.head), vectors])
    return plain.read(llm, prefix, [*ids, 0], [])[1:]


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_prompt_embeddings_for_vllm(made, capsys):
    llm, formatter, vectors, export = made
    tensors = load_file(export("vllm", "--ask", *ASKED))
    assert "after it a query is read as ' {input}'" in capsys.readouterr().out
    assert tensors.keys() == {"prefix", "prompt.0", "prompt.1"}
    for i, text in enumerate(ASKED):
        ids, prompt = formatter.query({"input": text}), tensors[f"prompt.{i}"]
        with torch.no_grad():
            found = llm(inputs_embeds=prompt[None]).logits[0]  # all that vLLM gets
        assert prompt.dtype == llm.dtype and len(prompt) == len(formatter.turns.head) + 4 + len(ids)
        close(found[-len(ids):], expected_logits(llm, formatter, vectors, ids))
    assert torch.equal(tensors["prefix"], tensors["prompt.0"][:len(tensors["prefix"])])


def test_an_adapter_for_peft(made, folder):
    peft = pytest.importorskip("peft")
    llm, formatter, vectors, export = made
    adapter = export("peft")
    model = peft.PeftModel.from_pretrained(load(folder), adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in ASKED:
        ids = tokenizer(f" {text}", add_special_tokens=False, return_tensors="pt").input_ids
        assert ids[0].tolist() == formatter.query({"input": text})
        with torch.no_grad():
            found = model(input_ids=ids).logits[0, -ids.shape[1]:]
        close(found, expected_logits(llm, formatter, vectors, ids[0].tolist()))
        written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6,
                                 do_sample=False, pad_token_id=0)[0, ids.shape[1]:]
        answer = tokenizer.decode(written, skip_special_tokens=True).strip()
        assert [answer] == Writer(llm, formatter, vectors).write([text], max_new_tokens=6, stop="")


def test_a_query_that_brings_its_own_bos_is_another_one_for_peft(made, folder):
    """Why BOS is the first row of the adapter, and not the tokenizer's to put after the vectors."""
    peft = pytest.importorskip("peft")
    llm, formatter, vectors, export = made
    if not formatter.turns.head:
        return
    adapter = export("peft")
    rows = load_file(adapter / "adapter_model.safetensors")["prompt_embeddings"]
    config = json.loads((adapter / "adapter_config.json").read_text())
    save_file({"prompt_embeddings": rows[1:].contiguous()}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"num_virtual_tokens": 4}))
    model = peft.PeftModel.from_pretrained(load(folder), adapter).eval()
    ids = formatter.query({"input": ASKED[0]})
    with torch.no_grad():
        found = model(input_ids=torch.tensor([[BOS, *ids]])).logits[0, -len(ids):]
    expected = expected_logits(llm, formatter, vectors, ids)
    assert (found - expected).norm() > 0.05 * expected.norm()


def test_keys_and_values(made):
    llm, formatter, vectors, export = made
    tensors = load_file(export("kv"))
    for text in ASKED:
        ids = formatter.query({"input": text})
        pairs = [(tensors[f"keys.{i}"], tensors[f"values.{i}"]) for i in range(len(tensors) // 2)]
        with torch.no_grad():
            found = llm(torch.tensor([ids]), past_key_values=DynamicCache(ddp_cache_data=pairs)).logits[0]
        close(found, expected_logits(llm, formatter, vectors, ids))


def test_keys_and_values_of_a_distiller_that_makes_them(folder, tmp_path):
    llm = load(folder)
    module = build_distiller("kv:2", llm, 4, "matched", 1).eval()
    run = save_distiller(tmp_path / "run", module, llm, "kv:2", **STATE)
    demos = write_lines(tmp_path / "demos.jsonl", [{"input": x, "output": y} for x, y in PAIRS])
    argv = ["--llm", str(folder), "--checkpoint", str(run), "--demos", demos, "--device", "cpu", "--dtype",
            "fp32"]
    result = distill.main([*argv, "--export", "kv", "--out", str(tmp_path / "c"), "--ask", *ASKED])
    tensors = load_file(tmp_path / "c")
    formatter = Formatter(Tokenizer(str(folder)), "space", 900)
    for text, answer in zip(ASKED, result["answers"]["mend"], strict=True):
        pairs = [(tensors[f"keys.{i}"], tensors[f"values.{i}"]) for i in range(3)]
        cache = DynamicCache(ddp_cache_data=pairs)
        ids = torch.tensor([[0] * cache.get_seq_length() + formatter.query({"input": text})])
        made = llm.generate(ids, past_key_values=cache, attention_mask=torch.ones_like(ids), do_sample=False,
                            max_new_tokens=16, pad_token_id=0)[0, ids.shape[1]:]
        written = formatter.tokenizer.hf.decode(made, skip_special_tokens=True).strip().split("\n")[0]
        assert written.strip() == answer
    for kind in ("vllm", "peft"):
        with pytest.raises(common.UserError, match="and kv:R makes keys and values"):
            distill.main([*argv, "--export", kind, "--out", str(tmp_path / kind)])
        assert not (tmp_path / kind).exists()


def test_free_vectors_go_to_peft_too(llama, llama_llm, tmp_path):
    peft = pytest.importorskip("peft")
    free = build_distiller("free", llama_llm, 3, "matched", 1)
    run = save_distiller(tmp_path / "run", free, llama_llm, "free", **STATE)
    distiller = Distiller.from_pretrained(run, llm=llama_llm)
    vectors = distiller.distill(str(llama))
    distiller.export("peft", tmp_path / "adapter", str(llama), vectors)
    model = peft.PeftModel.from_pretrained(load(llama), tmp_path / "adapter").eval()
    assert torch.equal(model.get_prompt(1)[0], vectors)
    for wrong, message in ((("peft", tmp_path / "adapter"), "is there already"),
                           (("gguf", tmp_path / "x"), "no export is called gguf")):
        with pytest.raises(common.UserError, match=message):
            distiller.export(*wrong, str(llama), vectors)


SMALL = dict(vocab_size=383, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
LLAMA = SMALL | dict(intermediate_size=64, num_key_value_heads=2, initializer_range=0.3)
OTHERS = [MistralConfig(**LLAMA, sliding_window=6),  # a window that is shorter than the prefix
          Gemma3TextConfig(**LLAMA, head_dim=8, sliding_window=6,  # scales its embeddings
                           layer_types=["sliding_attention", "full_attention"]),
          OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32, init_std=0.3)]


@pytest.mark.parametrize("config", OTHERS, ids=lambda config: config.model_type)
@torch.no_grad()
def test_other_families(config, llama, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(config).eval()
    formatter = Formatter(Tokenizer(str(llama)), "space", 900)
    formatter.turns.head = [BOS]
    vectors, query = 0.3 * torch.randn(9, 32), {"input": ASKED[0]}
    ids = formatter.query(query)
    for kind, export in EXPORTS.items():
        export(tmp_path / kind, llm, formatter, vectors, [query], {})
    kv = load_file(tmp_path / "kv")
    cache = DynamicCache(ddp_cache_data=[(kv[f"keys.{i}"], kv[f"values.{i}"]) for i in range(2)])
    found = [llm(torch.tensor([ids]), past_key_values=cache).logits,
             llm(inputs_embeds=load_file(tmp_path / "vllm")["prompt.0"][None]).logits,
             peft.PeftModel.from_pretrained(llm, tmp_path / "peft").eval()(torch.tensor([ids])).logits]
    for logits in found:
        close(logits[0, -len(ids):], expected_logits(llm, formatter, vectors, ids))


@pytest.mark.parametrize("kind", ["vllm", "peft", "kv"])
def test_what_is_not_exported(kind, llama, tmp_path):
    llm = T5ForConditionalGeneration(T5Config(vocab_size=383, d_model=32, d_kv=8, d_ff=64, num_layers=1,
                                              num_heads=4, decoder_start_token_id=0))
    formatter = Formatter(Tokenizer(str(llama)), "space", 900)
    with pytest.raises(common.UserError, match=f"--export {kind} is for decoder-only LLMs"):
        EXPORTS[kind](tmp_path / kind, llm, formatter, torch.zeros(2, 32), [], {})
    with pytest.raises(common.UserError, match=re.escape(f"--export {kind} needs a place: give --out")):
        distill.main(["--vectors", "v", "--export", kind])
    (tmp_path / kind).mkdir()
    with pytest.raises(common.UserError, match="is there already and holds something else"):
        distill.main(["--vectors", "v", "--export", kind, "--out", str(tmp_path / kind)])
