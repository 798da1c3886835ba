"""Every run script goes to its end with a tiny random LLM, and again without training or scoring anything
twice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import read_lines

import common
import train_finetune
from loading import checkpoint_id, load_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scripts(llama, tasks_dir, corpus_dir, tmp_path_factory):
    """Runs a script at a tiny scale; all share one folder, as they would for a user."""
    folder = tmp_path_factory.mktemp("runs")
    env = os.environ | {"PYTHON": sys.executable, "SCALE": "pocket", "METAICL_DIR": str(tasks_dir),
                        "C4_DIR": str(corpus_dir), "RESULTS": str(folder / "results"),
                        "RUNS": str(folder / "out"), "SEEDS": "100 13", "LIMIT": "8",
                        "SPLITS": "class_to_class", "KS": "1 4", "LENGTHS": "1 4", "BETAS": "0.5 0.8",
                        "GAMMAS": "0.1 1", "LAMBDAS": "0.1 1",
                        "EXTRA": f"--llm {llama} --k 4 --dtype fp32 --device cpu",
                        "EXTRA_DATA": f"--llm {llama}", "EXTRA_TRAIN": "--distiller layers:2 --distill-len 4",
                        "EXTRA_EVAL": "--distill-len 4",
                        "EXTRA_PRETRAIN": "--steps 2 --window 96 --batch-size 2 --eval-docs 2 --eval-every 2",
                        "EXTRA_FINETUNE": "--steps 2 --batch-size 1 --queries-per-demo 2 --eval-every 2",
                        "PAIRS": f"{llama},{llama}", "OMP_NUM_THREADS": "1",}

    def run(name: str, **more: str) -> Path:
        command = ["bash", str(common.ROOT / "paper" / "runs" / name)]
        done = subprocess.run(command, env=env | more, check=False, capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return folder
    return run


def results(folder: Path, name: str) -> list[dict]:
    return read_lines(folder / "results" / f"{name}.jsonl")


def columns(folder: Path, number: str) -> list[str]:
    table = folder / "results" / f"table{number}-pocket.md"
    return table.read_text().splitlines()[0].strip("| ").split(" | ")


WAYS = ("zero_shot", "majority", "icl", "icl_budget", "prompt_tuning", "hypertuning", "mend")


def assert_all_of_table_2(records: list[dict]) -> None:
    assert {(r["method"], r["task"], r["seed"]) for r in records} == {
        (method, task, seed) for method in WAYS for task in ("ag_news", "emo") for seed in (100, 13)}


def test_table1(scripts):
    folder = scripts("table1.sh")
    record, = results(folder, "table1-pocket")
    assert (record["train"]["tasks"], record["test"]["tasks"]) == (5, 2)
    assert "5 of 43" in (folder / "results" / "table1-pocket.md").read_text()


def test_table2_and_again(scripts, gpt2):
    folder = scripts("table2.sh")
    records = results(folder, "table2-pocket")
    assert_all_of_table_2(records)
    assert columns(folder, "2") == ["LLM", "row", "class_to_class"]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    assert len(before) == 10  # two pretrained, three finetuned: last and best
    scripts("table2.sh")
    assert results(folder, "table2-pocket") == records
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == before
    scripts("table2.sh", LLMS=f"own {gpt2}")  # the preset's, of which all is done, and another
    second = results(folder, "table2-pocket")[len(records):]
    assert_all_of_table_2(second)
    assert {r["llm"] for r in second} == {gpt2.name}
    assert len([*(folder / "out" / gpt2.name).rglob("*.safetensors")]) == 10


def test_table3(scripts):
    folder = scripts("table3.sh")
    assert columns(folder, "3")[2:] == ["none", "bm25", "dense", "no_label", "no_input", "random_label",
                                        "wrong_label"]
    assert len(results(folder, "table3-pocket")) == 3 * 7 * 2 * 2


def test_ablations(scripts):
    folder = scripts("ablations.sh")
    rows = [line.split(" | ")[1] for line in (folder / "results"
                                              / "table4-pocket.md").read_text().splitlines()
            if line.startswith("| tiny-llama")]
    assert rows == ["icl", "mend", "no_pretraining", "clm", "clm+kl", "without_pred", "without_distill"]
    assert {r["trained_on"]["pretrain"]["beta"] for r in results(folder, "fig6a-pocket")} == {0.5, 0.8}
    assert {r["trained_on"]["pretrain"]["gamma"] for r in results(folder, "fig6b-pocket")} == {0.1, 1}
    assert {r["trained_on"]["finetune"]["lam"] for r in results(folder, "fig7-pocket")} == {0.1, 1}
    for name in ("fig6", "fig7"):
        assert (folder / "results" / "figures" / f"{name}.png").stat().st_size > 5000


def test_table6(scripts):
    assert len(results(scripts("table6.sh"), "table6-pocket")) == 4 * 2 * 2


def test_table7(scripts):
    assert columns(scripts("table7.sh"), "7")[2:] == ["space", "newline", "difference"]


def test_fig4(scripts):
    folder = scripts("fig4.sh")
    assert {(r["method"], r["k"]) for r in results(folder, "fig4a-pocket")} == {
        (m, k) for m in ("icl", "hypertuning", "mend") for k in (1, 4)}
    assert {(r["method"], r["distill_len"]) for r in results(folder, "fig4b-pocket")} == {
        (m, length) for m in ("prompt_tuning", "hypertuning", "mend") for length in (1, 4)}
    assert (folder / "results" / "figures" / "fig4.png").stat().st_size > 5000


def test_fig5(scripts):
    folder = scripts("fig5.sh")
    assert json.loads((folder / "results" / "attention.json").read_text())["mend"]["prefix"]
    for name in ("fig5", "fig8"):
        assert (folder / "results" / "figures" / f"{name}.png").stat().st_size > 5000


def test_ratios(scripts, llama, tmp_path):
    finetune = ["--preset", "pocket", "--llm", str(llama), "--tasks", "functions", "--k", "4", "--steps", "1",
                "--eval-queries", "1", "--eval-every", "1", "--batch-size", "1", "--context-len", "300"]
    train_finetune.main([*finetune, "--distiller", "kv:2", "--distill-len", "9", "--elastic", "--init-from",
                         "none", "--template", "newline", "--out-dir", str(tmp_path / "run")])
    folder = scripts("ratios.sh", CHECKPOINT=str(tmp_path / "run"), LENGTHS="9 8", LIMIT="1", SEEDS="100",
                     PARTS="functions swaps", SWAP_LENGTH="9", EXTRA_EVAL="")
    found = {(r["method"], r["distill_len"]) for r in results(folder, "ratios-functions")}
    assert {("icl", 9), ("mend", 9), ("mend", 8), ("mend_constant", 8)} <= found and ("icl", 8) not in found
    for name in ("ratios", "swaps"):
        assert (folder / "results" / "figures" / f"{name}.png").stat().st_size > 5000


def test_kv(scripts, tmp_path):
    folder = scripts("kv.sh", EXTRA_TRAIN="--distiller kv:2 --distill-len 9", LENGTHS="9 8", LIMIT="1",
                     SEEDS="100", PARTS="functions", EXTRA_EVAL="", BIGBENCH="", KV_TASKS="functions early",
                     RESULTS=str(tmp_path / "results"),
                     EXTRA_FINETUNE="--steps 2 --batch-size 1 --eval-every 2 --eval-queries 1 --eval-tasks 3 "
                                    "--context-len 300")
    state = load_checkpoint(folder / "out" / "kv-class_to_class", weights=False)[1]
    assert state["model"]["distiller"] == "kv:2" and state["model"]["elastic"]
    assert state["trained_on"]["finetune"]["tasks"].startswith("functions early ")
    assert {r["checkpoint"] for r in results(tmp_path, "ratios-functions") if r["method"] == "mend"} == {
        checkpoint_id(folder / "out" / "kv-class_to_class")}


def test_lr(scripts):
    folder = scripts("lr.sh", RATES="1e-3 1e-2")
    records = results(folder, "lr-pocket")
    assert [(r["method"], r["lr"]) for r in records] == [
        (m, lr) for lr in (1e-3, 1e-2) for m in ("mend", "hypertuning", "prompt_tuning")]
    for r in records:
        state = load_checkpoint(Path(r["out_dir"]), weights=False)[1]
        assert (state["flags"]["lr"], state["best"]) == (r["lr"], r["best_option_ce"])


def test_gpu(scripts, tmp_path):
    with pytest.raises(AssertionError, match="give a whole number"):
        scripts("gpu.sh", RUNS=str(tmp_path), MINUTES="0.5")
    folder = scripts("gpu.sh", RUNS=str(tmp_path), WHAT="table2")
    assert_all_of_table_2(results(folder, "table2-pocket-gpu"))
    assert "mend" in (folder / "results" / "table2-pocket-gpu.md").read_text()
