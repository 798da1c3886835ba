"""Tests of swaps.py: its means by hand, and matrices against what evaluate.py says of the same cells."""

import json

import numpy as np
import pytest
import torch
from conftest import save_distiller
from test_figures import check_files

import common
import evaluate
from common import UserError
from loading import build_distiller
from paper import figures, swaps


def test_means_by_hand():
    matrix = np.array([[1, 0.5, 0], [0, 0.5, 0.25], [0, 0, 0]])
    assert swaps.means(matrix, ["a", "a", "b"]) == {"diagonal": 50, "same_family": 25, "elsewhere": 6.25}
    assert swaps.means(np.eye(2), ["a", "b"]) == {"diagonal": 100, "same_family": None, "elsewhere": 0}


@pytest.fixture
def flags(llama, tasks_dir):
    return ["--preset", "pocket", "--llm", str(llama), "--tasks", str(tasks_dir), "--device", "cpu", "--k",
            "4"]


def test_the_diagonal_and_the_swapped_cells_are_those_of_evaluation(flags, llama_llm, tmp_path, capsys):
    distiller = build_distiller("layers:2", llama_llm, 4, "residual", 0)
    with torch.no_grad():
        distiller.gain.mul_(30)  # so that whose demonstrations they are matters
    checkpoint = ["--checkpoint", str(save_distiller(tmp_path / "run", distiller, llama_llm, "layers:2",
                                                     "residual"))]
    out = tmp_path / "swaps.json"
    found = swaps.main([*flags, *checkpoint, "--limit", "5", "--out", str(out)])
    record = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
    lines = tmp_path / "lines.jsonl"
    evaluate.main([*flags, *checkpoint, "--seeds", "100", "--limit", "5", "--out", str(lines), "--methods",
                   "mend", "mend_swapped", "icl"])
    accuracy = {(r["method"], r["task"]): r["accuracy"] for r in map(json.loads, lines.open())}
    names = record["tasks"]
    assert len(names) == 2  # so that swapped means the other one
    for i, task in enumerate(names):
        assert record["matrices"]["mend"][i][i] == pytest.approx(accuracy["mend", task], abs=1e-4)
        assert record["matrices"]["icl"][i][i] == pytest.approx(accuracy["icl", task], abs=1e-4)
        assert record["matrices"]["mend"][1 - i][i] == pytest.approx(accuracy["mend_swapped", task], abs=1e-4)

    drawn = figures.main(["swaps", "--results", str(out), "--out", str(tmp_path)])
    check_files(drawn, tmp_path, "swaps")
    assert drawn["drawn"] == record


def test_user_errors(flags, tmp_path):
    with pytest.raises(UserError, match="--seed 7: MetaICL's are.*--limit is 0"):
        swaps.main([*flags, "--checkpoint", "x", "--seed", "7", "--limit", "0"])


@pytest.mark.parametrize("name", ["swaps", "fig3", "scaling", "fig5", "fig8"])
@pytest.mark.parametrize("content", ["{}", "[]", "5", "no", '{"settings": [], "scaling": [], "scores": 5, '
                                     '"heads": [], "icl": 1, "mend": null, "families": []}'])
def test_a_file_of_another_kind_is_no_figure(tmp_path, name, content):
    (tmp_path / "no.json").write_text(content)
    with pytest.raises(UserError, match=f"no.json does not hold what {name} draws"):
        figures.main([name, "--results", str(tmp_path / "no.json"), "--out", str(tmp_path)])


@pytest.mark.parametrize(("spec", "split", "lam", "message"), [
    ("free", "class_to_class", 0, "holds free vectors"),
    ("layers:2", "class_to_class", 0, "without L_distill"),
    ("layers:2", "non_class_to_class", 1, "training tasks include emo")])
def test_no_other_method_is_called_mend_and_no_seen_task_unseen(flags, llama_llm, tmp_path, monkeypatch, spec,
                                                                split, lam, message):
    trained_on = {"finetune": {"tasks": "metaicl", "split": split, "lam": lam}}
    distiller = build_distiller(spec, llama_llm, 4, "matched", 0)
    run = save_distiller(tmp_path / "run", distiller, llama_llm, spec, trained_on=trained_on)
    table = json.loads((common.ROOT / "splits.json").read_text())
    table["metaicl"]["settings"]["non_class_to_class"] = {"train": ["emo"], "test": ["trec"]}
    (tmp_path / "splits.json").write_text(json.dumps(table))
    monkeypatch.setattr(common, "ROOT", tmp_path)
    with pytest.raises(UserError, match=message):
        swaps.main([*flags, "--checkpoint", str(run), "--out", str(tmp_path / "s.json")])
    assert not (tmp_path / "s.json").exists()
