"""Tests of probe.py: its figures by hand, and on distillers whose corrections are known."""

import json

import pytest
import torch
from conftest import save_distiller

from common import UserError
from data import Formatter
from loading import build_distiller
from paper import probe

CPU = torch.device("cpu")


def test_figures_by_hand():
    # mean (3, 0): 2 * 9 of 50; cosine (9 - 16) / 25
    corrections = torch.tensor([[[3.0, 4.0]], [[3.0, -4.0]]])
    swapped = torch.tensor([[[3.0, 4.0]], [[3.0, 1.0]]])       # changed by 0, and by 5 of 5
    starts = torch.tensor([[[1.0, 7.0]], [[5.0, 5.0]]])        # sum of squares 100 over 4 numbers
    assert probe.figures_of(starts, corrections, swapped) == pytest.approx(
        {"shared_energy": 0.36, "mean_cosine": -0.28, "least_change": 0, "most_change": 1,
         "rms_correction": 12.5 ** 0.5, "rms_start": 5})


@pytest.fixture
def probed(llama, llama_llm, tasks_dir, tmp_path):
    """Probes a distiller that `change` was applied to: (spec, start, change) -> final figures."""
    def probed(spec, start, change=lambda distiller: None):
        distiller = build_distiller(spec, llama_llm, 4, start, 0)
        with torch.no_grad():
            change(distiller)
        path = save_distiller(tmp_path / "run", distiller, llama_llm, spec, start)
        return probe.main(["--preset", "pocket", "--llm", str(llama), "--tasks", str(tasks_dir), "--device",
                           "cpu", "--k", "4", "--checkpoint", str(path)])
    return probed


def test_a_distiller_without_gain_has_no_correction(probed, tokenizer, llama_llm, tiny_tasks, capsys):
    found = probed("layers:2", "residual", lambda distiller: distiller.gain.fill_(0))
    assert (found["rms_correction"], found["shared_energy"], found["most_change"]) == (0, None, None)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found and found["tasks"] == 2
    tasks, formatter = tiny_tasks, Formatter(tokenizer, "space", 900)
    embed = llama_llm.get_input_embeddings().weight
    last = [i for t in tasks.test
            for i in formatter.demonstrations(tasks.files(t, 100)["train"][:4], 900)[-4:]]
    assert found["rms_start"] == pytest.approx(embed[last].pow(2).mean().sqrt().item(), rel=1e-5)


def test_keys_and_values_are_no_corrections(probed):
    with pytest.raises(UserError, match="paper.probe looks at vectors at the LLM's input"):
        probed("kv:2", "matched")


def test_free_vectors_are_the_same_correction_for_all(probed):
    found = probed("free", "matched")
    assert (found["shared_energy"], found["mean_cosine"]) == pytest.approx((1, 1))
    assert found["most_change"] == 0 and found["rms_start"] == 0 < found["rms_correction"]


def test_an_untrained_distiller_corrects_each_task_in_its_own_way(probed):
    found = probed("layers:2", "residual", lambda distiller: distiller.gain.mul_(3))
    assert 0.5 < found["shared_energy"] < 0.999 and -1 < found["mean_cosine"] < 0.999
    assert 0.01 < found["least_change"] <= found["most_change"]


def test_user_errors(llama, tasks_dir):
    with pytest.raises(UserError, match="--seed 7: MetaICL's are.*--context-len is 0"):
        probe.main(["--preset", "pocket", "--llm", str(llama), "--checkpoint", "x", "--seed", "7",
                    "--context-len", "0"])
    with pytest.raises(UserError, match="no checkpoint at /nowhere"):
        probe.main(["--preset", "pocket", "--llm", str(llama), "--tasks", str(tasks_dir),
                    "--checkpoint", "/nowhere"])
