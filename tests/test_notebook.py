"""mend.ipynb: its cells run as they stand, with a tiny LLM and distiller in place of the real ones."""

import json

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from conftest import load, make_distiller, model_of, save_distiller

import common


@pytest.fixture(scope="module")
def cells() -> list[dict]:
    return json.loads((common.ROOT / "mend.ipynb").read_text(encoding="utf-8"))["cells"]


def test_the_notebook_runs(cells, llama, tmp_path, capsys, monkeypatch):
    llm = load(llama)
    distiller = make_distiller(llm, "kv:3", 9)
    checkpoint = save_distiller(tmp_path / "run", distiller, llm,
                                model=model_of(distiller, llm, "kv:3") | {"elastic": True})
    monkeypatch.setattr(matplotlib, "use", lambda *_: None)
    plt.switch_backend("agg")
    scope, grad = {}, torch.is_grad_enabled()
    try:
        for cell in cells:
            if cell["cell_type"] == "code":
                source = "".join(cell["source"]).replace("assets/SmolLM2-135M-Instruct", str(llama))
                exec(source.replace("checkpoints/smollm2-135m.safetensors", str(checkpoint)), scope)
    finally:
        torch.set_grad_enabled(grad)
    out = capsys.readouterr().out
    assert scope["near"].shape == (8, len(scope["demo"]["she"])) and scope["near"].abs().max() < 1.0001
    assert all(word in out for word in ("zero-shot", "ICL", "MEND", "swapped", "nearest to", "positions"))
    ax, _ = scope["fig"].axes
    assert len(ax.get_xticks()) == len(scope["words"])
    assert ax.images[0].get_array().shape == scope["near"].shape
    plt.close(scope["fig"])


def test_the_notebook_is_short_and_holds_its_outputs(cells):
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) <= 10 and all(cell["execution_count"] == i for i, cell in enumerate(code, 1))
    outputs = [o for cell in code for o in cell["outputs"]]
    assert any("image/png" in o.get("data", {}) for o in outputs)
    assert not any(o.get("name") == "stderr" or o["output_type"] == "error" for o in outputs)
    assert max(len(line.rstrip("\n")) for cell in cells for line in cell["source"]) <= 120
