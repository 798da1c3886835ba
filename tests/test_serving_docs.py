"""docs/serving.md from its first passage to its last, commands and Python, with a small random LLM."""

import re
import runpy
import shlex
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import load, save_distiller, write_lines
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import distill
from loading import build_distiller, load_checkpoint
from serving.pretrained import Distiller

STATE = {"trained_on": {}, "step": 3, "metrics": {}, "commit": "abc", "flags": {}}


class LLM:
    """vLLM's, as far as its documentation says what it takes."""

    def __init__(self, model: str, enable_prompt_embeds: bool):
        assert enable_prompt_embeds
        self.llm = AutoModelForCausalLM.from_pretrained(model)
        self.tokenizer = AutoTokenizer.from_pretrained(model)

    def generate(self, prompts: list[dict], params) -> list:
        assert params.temperature == 0.0 and all(prompt.keys() == {"prompt_embeds"} for prompt in prompts)
        said = []
        for prompt in prompts:
            made = self.llm.generate(inputs_embeds=prompt["prompt_embeds"][None], max_new_tokens=8,
                                     do_sample=False)
            text = self.tokenizer.decode(made[0], skip_special_tokens=True)
            said.append(SimpleNamespace(outputs=[SimpleNamespace(text=text)]))
        return said


def checkpoint(folder, name: str, llm, spec: str):
    """An untrained, elastic distiller of the template newline."""
    module = build_distiller(spec, llm, 8, "residual", 1)
    run = save_distiller(folder / "runs" / name, module, llm, spec, "residual", **STATE)
    tensors, state = load_checkpoint(run)
    state["model"] |= {"template": "newline", "elastic": True}
    Distiller(tensors, state).save_pretrained(folder / "made" / name)
    return folder / "made" / name


def test_serving_from_its_first_passage_to_its_last(llama, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    name = tmp_path / "assets" / "SmolLM2-135M-Instruct"
    for folder in ("assets", "checkpoints", "out"):
        (tmp_path / folder).mkdir()
    name.symlink_to(llama)
    llm, published = load(name), tmp_path / "checkpoints" / "smollm2-135m.safetensors"
    published.symlink_to(checkpoint(tmp_path, "kv", llm, "kv:3") / "model.safetensors")
    (tmp_path / "out" / "fine").symlink_to(checkpoint(tmp_path, "layers", llm, "layers:2"))
    write_lines(tmp_path / "demos.jsonl", [{"input": x, "output": f"she {x}s"} for x in ("walk", "bring")])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distill, "PUBLISHED", published)
    monkeypatch.setitem(common.PRESETS["pocket"], "llm", str(name))
    vllm = ModuleType("vllm")
    vllm.LLM, vllm.SamplingParams = LLM, SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", vllm)

    text = (common.ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    scope, answers = {}, []
    for language, passage in re.findall(r"```(python)?\n(.*?)```", text, re.DOTALL):
        if language:
            (tmp_path / "passage.py").write_text(passage, encoding="utf-8")
            scope |= runpy.run_path("passage.py", init_globals=scope)
        else:
            (command,) = passage.splitlines()
            call = shlex.split(command.removeprefix("python distill.py "))
            answers.append(distill.main([*call, "--device", "cpu", "--dtype", "fp32"]).get("answers"))

    again = scope["again"].distill(scope["tokenizer"], scope["examples"])
    assert len(again) == 8 and torch.equal(again, scope["vectors"])
    assert scope["first"] == scope["answers"][:2] and len(scope["drawn"]) == 2
    demos = [{"input": x, "output": f"she {x}s"} for x in ("walk", "bring")]
    kv, layers = (Distiller.from_pretrained(place, llm=llm) for place in (published, "out/fine"))
    by_kv, by_layers = (d.writer(str(name), d.distill(str(name), demos)).write(
        ["sing", "wash"], max_new_tokens=8, stop="") for d in (kv, layers))
    assert scope["said_by_kv"].strip() == by_kv[0] != by_layers[0] == scope["said_by_peft"].strip()
    assert [said.strip() for said in scope["said_by_vllm"]] == by_layers
