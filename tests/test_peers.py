"""bench.py --peers with the real libraries: what they compute is what we compute, so that times compare like
with like; lm-evaluation-harness is one more oracle of Eq. (1), peft one of PromptTuning's gradient."""

import json
import statistics
import sys

import pytest
import torch
from conftest import CPU, example, load, write_lines
from test_families import close

import bench
from common import UserError
from data import Formatter
from loading import load_llm
from paper import peers
from score import one_prefix, passes, score_options
from sources.text import Tokenizer

LABELS = ("happy", "sad")
DEMOS = [{"task": "t", "input": f"the river {i} is cold", "output": "happy" if i % 2 else "sad",
          "options": ["happy", "sad"]} for i in range(5)]
QUERIES = [{"task": "t", "input": f"small boat {i}", "output": "sad", "options": ["happy", "sad", "12 ships"]}
           for i in range(4)]


def test_the_harness_gives_our_scores(llm_folder):
    llm, tokenizer = load(llm_folder), Tokenizer(str(llm_folder))
    formatter = Formatter(tokenizer, "newline", 900)
    queries = [formatter.scoring_query(q) for q in QUERIES]
    before = formatter.demonstrations(DEMOS, 900)
    pairs = [(before + x, y) for x, ys in queries for y in ys]
    theirs = torch.tensor(peers.harness(llm, tokenizer.hf, batch_size=5)(pairs))
    prefix = one_prefix("icl", DEMOS, 900, llm, None, formatter, None)
    with torch.no_grad():
        ours = torch.cat([score_options(llm, prefix, batch)[0].flatten() for batch in passes(queries, CPU)])
    lengths = torch.tensor([len(y) for _, y in pairs])
    close(ours * lengths, theirs, 1e-4)
    assert theirs.std() > 0.1 and {*lengths.tolist()} != {1}


@pytest.mark.parametrize("sets, queries", [(1, 4), (3, 1)])
def test_peft_takes_our_step(llm_folder, sets, queries):
    llm, tokenizer = load_llm(str(llm_folder), CPU, torch.float32), Tokenizer(str(llm_folder))
    formatter = Formatter(tokenizer, "newline", 900)
    picked = QUERIES + DEMOS
    rows = [{"demo": [5, 6], "queries": [formatter.training_query(q) for q in picked[i:i + queries]]}
            for i in range(sets)]
    steps = peers.prompt_steps(llm, rows, 3, [])
    (loss, gradient), (other, expected) = steps["ours"](), steps["peft"]()
    assert loss == pytest.approx(other, abs=1e-5) and expected.norm() > 1e-3
    close(gradient, expected, 1e-5)
    again = steps["ours"]()  # nothing is left over from the first
    assert again[0] == loss and torch.equal(again[1], gradient)


def test_bench_states_the_ratios(flags, tmp_path, monkeypatch, capsys):
    scoring = peers.scoring
    monkeypatch.setattr(peers, "scoring", lambda *args: scoring(*args, n=12, options=3))
    out = tmp_path / "peers.json"
    final = bench.main(["--peers", *flags, "--k", "4", "--repeats", "2", "--out", str(out)])
    saved = json.loads(out.read_text())
    assert final["ratios"] == saved["ratios"] and saved["command"].startswith("python bench.py --peers")
    for name, other in (("scoring", "harness"), ("prompt_tuning_q4", "peft"), ("prompt_tuning_q1", "peft")):
        times = saved["details"][name]["times"]
        assert len(times["ours"]) == len(times[other]) == 2
        assert saved["ratios"][name] == statistics.median(b / a for a, b in zip(*times.values(), strict=True))
    details = saved["details"]
    assert details["scoring"]["queries"] == 12 and details["scoring"]["score_difference"] < 1e-4
    assert details["prompt_tuning_q4"]["gradient_difference"] < 1e-4
    assert "scoring 12 queries of" in capsys.readouterr().out


def test_faults_are_told_before_anything_is_timed(flags, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "scoring", None)
    own = write_lines(tmp_path / "own.jsonl", [example(f"boat {i}", LABELS[i % 2]) for i in range(80)])
    for mode in ("--peers", "--suite"):
        with pytest.raises(UserError, match="own.jsonl has no meta-training tasks of own.*; give another"):
            bench.main([mode, *flags, "--tasks", own])
        with pytest.raises(UserError, match="has .* and --k 4000 with 4 queries needs 4004"):
            bench.main([mode, *flags, "--k", "4000"])


def test_what_is_missing_is_named(llama_llm, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    with pytest.raises(UserError, match="lm_eval is not installed here; python -m pip install -r req"):
        peers.harness(llama_llm, tokenizer.hf, 1)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match="peft is not installed"):
        peers.prompt_steps(llama_llm, [], 3, [])
