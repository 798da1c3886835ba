"""Every Python passage of docs/serving.md, run in order, with a small random LLM in place of the real one."""

import re
import runpy

import pytest
import torch
from conftest import load, save_distiller

import common
from loading import build_distiller, load_checkpoint
from serving.pretrained import Distiller

STATE = {"trained_on": {}, "step": 3, "metrics": {}, "commit": "abc", "flags": {}}


def passages(place: str) -> list[str]:
    text = (common.ROOT / place).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def stand_in(folder, llama, spec: str) -> None:
    """A small LLM and an untrained, elastic distiller where the documents have the real ones."""
    (folder / "assets").mkdir()
    (folder / "assets" / "SmolLM2-135M-Instruct").symlink_to(llama)
    llm = load(folder / "assets" / "SmolLM2-135M-Instruct")
    run = save_distiller(folder / "run", build_distiller(spec, llm, 8, "residual", 1), llm, spec, "residual",
                         **STATE)
    tensors, state = load_checkpoint(run)
    state["model"] |= {"template": "newline", "elastic": True}
    Distiller(tensors, state).save_pretrained(folder / "made")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "smollm2-135m.safetensors").symlink_to(folder / "made" / "model.safetensors")


@pytest.mark.parametrize("spec", ["kv:3", "layers:2"])
def test_the_passages_of_serving_run(spec, llama, tmp_path, monkeypatch):
    stand_in(tmp_path, llama, spec)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "passages.py").write_text("".join(passages("docs/serving.md")), encoding="utf-8")
    scope = runpy.run_path(str(tmp_path / "passages.py"))
    distiller, vectors = scope["again"], scope["vectors"]
    assert vectors.dim() == 2 and len(vectors) == 8 and len(scope["answers"]) == 3
    assert scope["first"] == scope["answers"][:2] and len(scope["drawn"]) == 2
    assert torch.equal(distiller.distill(scope["tokenizer"], scope["examples"]), vectors)
