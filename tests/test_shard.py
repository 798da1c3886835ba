"""--shard-llm: the LLM's layers over the ranks of torchrun (gloo), against one process."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import make_distiller, read_lines, save_distiller
from training import train

import common
import evaluate
import train_finetune
import train_pretrain
from common import UserError
from loading import load_checkpoint
from sources.headers import check_same_step

DRIVER = """
import sys
sys.path[:0] = [{root!r}]
from pathlib import Path
import torch, common, {script}
torch.set_num_threads(1)
common.CACHE, common.OUT = Path({folder!r}) / "cache", Path({folder!r}) / "out"
common.run_main({script}.main)
"""


def torchrun(ranks: int, script, argv: list[str], folder: Path, port: int) -> subprocess.CompletedProcess:
    driver = folder / f"{script.__name__}_{port}.py"
    driver.write_text(DRIVER.format(root=str(common.ROOT), folder=str(folder), script=script.__name__))
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks),
                           "--master_addr", "127.0.0.1", "--master_port", str(port), str(driver), *argv],
                          timeout=300, text=True, capture_output=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"})


def assert_shared_out(out: str, ranks: int, llm) -> None:
    """Each rank holds its part of the layers' bytes, rounded up to whole rows."""
    whole = sum(p.numel() * 4 for layer in llm.base_model.layers for p in layer.parameters()) / 1e6
    said, share = map(float, re.search(r"layers, ([\d.]+) MB, stand on \d ranks: ([\d.]+) MB", out).groups())
    assert said == pytest.approx(whole, abs=6e-4) and share < 1.15 * whole / ranks


@pytest.mark.parametrize("script, ranks", [
    (train_finetune, 2), pytest.param(train_pretrain, 3, marks=pytest.mark.slow)], indirect=["script"])
def test_sharded_training_equals_one_process(script, argv, ranks, tmp_path, llama_llm):
    argv = [*argv, "--batch-size", str(ranks), "--steps", "3", "--eval-every", "3", "--eval-queries", "2"]
    train(script, argv, tmp_path / "one")
    done = torchrun(ranks, script, [*argv, "--shard-llm", "--out-dir", str(tmp_path / "many")], tmp_path,
                    29650 + ranks)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_shared_out(done.stdout, ranks, llama_llm)
    one, many = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("one", "many"))
    assert len(one) == len(many) == 5
    for a, b in zip(one, many, strict=True):
        assert a.keys() == b.keys()
        assert {n: v for n, v in b.items() if n != "seconds"} == pytest.approx(
            {n: v for n, v in a.items() if n != "seconds"}, rel=1e-5)
    for name, tensor in load_checkpoint(tmp_path / "one" / "last.safetensors")[0].items():
        if name.startswith("distiller."):  # AdamW makes much of the last digit of a small gradient
            found = load_checkpoint(tmp_path / "many" / "last.safetensors")[0][name]
            torch.testing.assert_close(found, tensor, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_sharded_evaluation_equals_one_process(flags, tmp_path, llama_llm, ranks):
    checkpoint = save_distiller(tmp_path / "run", make_distiller(llama_llm), llama_llm, "layers:2")
    argv = [f for f in flags if f not in ("--distiller", "layers:2")] + [
        "--k", "4", "--limit", "4", "--checkpoint", str(checkpoint), "--methods", "zero_shot", "icl", "mend",
        "--seeds", "13", "21"]
    evaluate.main([*argv, "--out", str(tmp_path / "one.jsonl")])
    lines = (tmp_path / "one.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "many.jsonl").write_text("".join(lines[:5]))  # some are there already
    done = torchrun(ranks, evaluate, [*argv, "--shard-llm", "--out", str(tmp_path / "many.jsonl")], tmp_path,
                    29660 + ranks)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_shared_out(done.stdout, ranks, llama_llm)
    assert read_lines(tmp_path / "many.jsonl") == read_lines(tmp_path / "one.jsonl") and len(lines) == 12
    assert json.loads(done.stdout.strip().splitlines()[-1])["tasks"] == 2


def test_what_cannot_be_sharded(finetuning, quick_dev, tmp_path):
    with pytest.raises(UserError, match="--shard-llm shares the LLM out over torchrun's ranks, and"):
        train(train_finetune, [*finetuning, "--shard-llm"], tmp_path / "run")


def test_ranks_that_found_different_checkpoints_do_not_go_on(monkeypatch, tmp_path):
    monkeypatch.setattr("sources.headers.gather", lambda own: [*own, 0])
    check_same_step(tmp_path, 0)
    with pytest.raises(UserError, match=r"the ranks found steps \[0, 40\].*that all machines share"):
        check_same_step(tmp_path, 40)


def test_a_run_asks_the_others_where_they_are(finetuning, quick_dev, tmp_path, monkeypatch):
    argv = [*finetuning, "--steps", "1"]
    train(train_finetune, argv, tmp_path / "run")
    monkeypatch.setattr("sources.headers.gather", lambda own: [*own, 0])
    with pytest.raises(UserError, match=r"the ranks found steps \[0, 1\] in .*run"):
        train(train_finetune, argv, tmp_path / "run", "--resume")


@pytest.mark.slow
def test_a_lost_rank_ends_the_job_and_resume_goes_on(pretraining, tmp_path):
    """Two agents of one rank each, as two nodes have, meet on the loopback address; one is killed."""
    argv = [*pretraining, "--batch-size", "2", "--steps", "60", "--eval-every", "60", "--save-every", "1"]
    folder = tmp_path / "cut"
    driver = tmp_path / "nodes.py"
    driver.write_text(DRIVER.format(root=str(common.ROOT), folder=str(tmp_path), script="train_pretrain"))

    def agents(number: int, *more: str, out: Path) -> list[subprocess.Popen]:
        return [subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1",
             "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{29670 + number}",
             "--rdzv_id", f"mend{number}",
             "--local_addr", "127.0.0.1", str(driver), *argv, "--out-dir", str(out), *more],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}) for _ in range(2)]

    whole = agents(1, out=tmp_path / "whole")
    assert [p.wait(timeout=100) for p in whole] == [0, 0], whole[0].stdout.read()[-2000:]
    cut, metrics, deadline = agents(2, out=folder), folder / "metrics.jsonl", time.time() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 12) and time.time() < deadline:
        time.sleep(0.05)
    workers = subprocess.run(["pgrep", "-P", str(cut[1].pid)], capture_output=True, text=True).stdout.split()
    for pid in (cut[1].pid, *map(int, workers)):  # a node is gone
        os.kill(pid, signal.SIGKILL)
    started = time.time()
    assert cut[0].wait(timeout=150) != 0 and time.time() - started < 200
    again = agents(3, "--resume", out=folder)
    assert [p.wait(timeout=240) for p in again] == [0, 0], again[0].stdout.read()[-2000:]
    a, b = (load_checkpoint(f / "last.safetensors")[0] for f in (tmp_path / "whole", folder))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
