"""D in segments that are distilled one by one. Oracles: plain.py's distiller on each segment alone; for keys
and values, each segment alone with its keys turned further by transformers' own rotation."""

import json
import random

import pytest
import torch
from conftest import make_distiller, read_lines, save_distiller, write_lines
from test_data import random_rows
from training import assert_same, train
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, rotate_half

import data
import distill
import evaluate
import plain
import run
import score
import train_finetune
import train_pretrain
from common import UserError
from data import Formatter, collate, flat
from loading import build_distiller, load_llm

CPU, L = torch.device("cpu"), 4
DEMOS = [{"task": "t", "input": f"text number {i} " * (1 + i % 3), "output": "yes" if i % 2 else "no",
          "options": ["no", "yes"]} for i in range(12)]


def formatter_of(tokenizer, segments, **more) -> Formatter:
    return Formatter(tokenizer, "space", 900, L, segments=segments, **more)


def parts_of(tokenizer, segments, limit: int, **more) -> list[list[tuple]]:
    return formatter_of(tokenizer, segments, **more).parts(DEMOS, limit)


@pytest.mark.parametrize("segments", [1, 2, 3, 12, "auto"])
def test_parts_hold_every_demonstration_once_and_in_order(tokenizer, segments):
    whole = formatter_of(tokenizer, 1).demonstrations(DEMOS, 900)
    limit = len(whole) // 3 if segments == "auto" else 900
    parts = parts_of(tokenizer, segments, limit)
    assert [e for part in parts for e, _ in part] == DEMOS and flat(sum(parts, [])) == whole
    if segments == "auto":  # none could have taken the next one's first demonstration
        assert len(parts) >= 3 and all(len(flat(part)) <= limit for part in parts)
        assert all(len(flat([*a, b[0]])) > limit for a, b in zip(parts, parts[1:], strict=False))
    else:
        assert len(parts) == segments and max(map(len, parts)) - min(map(len, parts)) <= 1


def test_what_does_not_fit_is_said(tokenizer):
    with pytest.raises(UserError, match="--segments 13: 12 demonstrations give segments.*; give auto or"):
        parts_of(tokenizer, 13, 900)
    with pytest.raises(UserError, match="--segments 2: .* for 1 to 20"):
        parts_of(tokenizer, 2, 20)
    with pytest.raises(UserError, match="segments of 4 vectors, and the LLM has positions for 2; give a s"):
        parts_of(tokenizer, "auto", 20, llm_positions=data.MAX_INPUT + 12)


@pytest.mark.parametrize("segments", [1, 2, 3, 50])
def test_collate_cuts_at_starts(segments):
    rows, rng = random_rows(random.Random(5)), random.Random(6)
    for row in rows:
        row["demo"] = [rng.randint(1, 400) for _ in range(rng.randint(5, 30))]
        row["starts"] = [0, *sorted(rng.sample(range(1, len(row["demo"])), 4))]
    batch = collate(rows, segments=segments)
    S = min(segments, 5)
    assert len(batch["part_ids"]) == S * len(rows)
    for b, row in enumerate(rows):
        parts = [ids[mask].tolist() for ids, mask in zip(batch["part_ids"][b * S:b * S + S],
                                                         batch["part_mask"][b * S:b * S + S], strict=True)]
        assert sum(parts, []) == row["demo"] and all(parts)
        ends = torch.tensor([len(part) for part in parts]).cumsum(0).tolist()
        assert {0, *ends[:-1]} <= {*row["starts"]}
    assert (segments > 1) or batch["part_ids"] is batch["demo_ids"]


def test_vectors_of_segments_are_those_of_each_alone(llm_folder, tokenizer):
    llm = load_llm(str(llm_folder), CPU, torch.float32)
    distiller = make_distiller(llm)
    parts = formatter_of(tokenizer, 3).parts(DEMOS, 300)
    found = score.distil(parts, distiller, CPU, "fp32", [])
    with torch.no_grad():
        expected = torch.cat([plain.Distiller.forward(distiller, flat(part)) for part in parts])
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=1e-4)


def turned(keys: torch.Tensor, config, by: int) -> torch.Tensor:
    """Keys of one layer, (heads, n, width), at positions that lie `by` further."""
    cos, sin = LlamaRotaryEmbedding(config)(keys, torch.tensor([[by]]))
    return keys * cos[0] + rotate_half(keys) * sin[0]


def test_keys_of_segments_stand_one_behind_the_other(llm_folder, tokenizer):
    llm = load_llm(str(llm_folder), CPU, torch.float32)
    config, d = llm.config, llm.get_input_embeddings().embedding_dim
    distiller = build_distiller("kv:3", llm, L, "residual", seed=0)
    parts = formatter_of(tokenizer, 3).parts(DEMOS, 300)
    found = score.distil(parts, distiller, CPU, "fp32", [])[0]                         # (3 (L - 1) + 1, W)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    expected = []
    for i, part in enumerate(parts):
        alone = score.distil([part], distiller, CPU, "fp32", [])[0]                    # (L, W)
        if config.model_type != "gpt2":  # its positions are not in the keys' angle
            layers = alone[:, :-d].unflatten(1, (config.num_hidden_layers, 2, heads, -1)).clone()
            for layer in range(config.num_hidden_layers):
                layers[:, layer, 0] = turned(layers[:, layer, 0].transpose(0, 1), config,
                                             i * (L - 1)).transpose(0, 1)
            alone = torch.cat([layers.flatten(1), alone[:, -d:]], dim=1)
        expected.append(alone[1 if i else 0:])
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("script", [train_pretrain, train_finetune], indirect=True)
def test_training_mixes_segments_and_resumes(script, argv, quick_dev, tmp_path, monkeypatch):
    seen, forward = [], collate
    monkeypatch.setattr(script, "collate", lambda rows, device, segments: (
        seen.append(segments), forward(rows, device, segments))[1])
    argv = [*argv, "--max-segments", "3", "--steps", "8"]
    train(script, argv, tmp_path / "whole")
    assert {*seen} == {1, 2, 3}
    stop = run.Run.end_step

    def cut(self, n_tokens):
        stop(self, n_tokens)
        if self.step == 5:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "end_step", cut)
        with pytest.raises(KeyboardInterrupt):
            train(script, [*argv, "--save-every", "1"], tmp_path / "cut")
    train(script, argv, tmp_path / "cut", "--resume")
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_evaluation_in_segments(tmp_path, llama, llama_llm, tasks_dir, tiny_tasks, tokenizer, monkeypatch):
    distiller = make_distiller(llama_llm)
    folder = save_distiller(tmp_path / "run", distiller, llama_llm, "layers:2")
    argv = ["--preset", "pocket", "--llm", str(llama), "--tasks", str(tasks_dir), "--checkpoint", str(folder),
            "--k", "4", "--seeds", "13", "--only", "emo", "--dtype", "fp32", "--device", "cpu", "--out",
            str(tmp_path / "out.jsonl"), "--methods", "mend", "last_l", "icl"]
    seen, prefix = [], score.vector_prefix
    monkeypatch.setattr(score, "vector_prefix", lambda llm, vectors, bos: (seen.append(vectors),
                                                                           prefix(llm, vectors, bos))[1])
    evaluate.main([*argv, "--segments", "2"])
    demos = tiny_tasks.files("emo", 13)["train"][:4]
    parts = Formatter(tokenizer, "space", 900, L, segments=2).parts(demos, 900)
    with torch.no_grad():
        expected = torch.cat([plain.Distiller.forward(distiller, flat(part)) for part in parts])
    torch.testing.assert_close(seen[0][0], expected, atol=1e-5, rtol=1e-4)
    whole = Formatter(tokenizer, "space", 900, L, segments=2)
    assert score.demo_tokens("last_l", demos, 900, whole) == whole.demonstrations(demos, 900)[-2 * L:]
    lines = read_lines(tmp_path / "out.jsonl")
    assert [line["segments"] for line in lines] == [2, 2, 2]
    context = len(flat(parts[0]))  # what icl reads of D
    evaluate.main([*argv, "--segments", "auto", "--context-len", str(context), "--methods", "mend", "icl"])
    mend, icl = (line["demo_tokens"] for line in read_lines(tmp_path / "out.jsonl")[3:])
    cut = Formatter(tokenizer, "space", context, L, segments="auto")
    assert cut.fitting(demos, context) == demos and icl == len(cut.demonstrations(demos, context)) <= context
    assert mend == sum(len(flat(part)) for part in cut.parts(demos, context)) > context
    (tmp_path / "out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluate.main([*argv, "--segments", "1"])  # another setting: evaluated anew
    assert len(read_lines(tmp_path / "out.jsonl")) == 6
    with pytest.raises(UserError, match="mend_constant is a mean.*give --segments a number"):
        evaluate.main([*argv, "--segments", "auto", "--methods", "mend_constant"])
    with pytest.raises(UserError, match="--segments is below 1"):
        evaluate.main([*argv, "--segments", "0"])


def test_more_demonstrations_than_a_context_holds(tmp_path, llama, llama_llm, capsys):
    folder = save_distiller(tmp_path / "run", make_distiller(llama_llm), llama_llm, "layers:2")
    write_lines(tmp_path / "demos.jsonl", [{k: v for k, v in e.items() if k != "task"} for e in DEMOS])
    argv = ["--llm", str(llama), "--checkpoint", str(folder), "--demos", str(tmp_path / "demos.jsonl"),
            "--ask", "text number 3", "--device", "cpu", "--dtype", "fp32", "--context-len", "60"]
    few, many = distill.main(argv), distill.main([*argv, "--segments", "auto"])
    assert few["demonstrations"] < 12 == many["demonstrations"] and few["vectors"] == L
    assert many["vectors"] > 2 * L and many["vectors"] % L == 0 and many["tokens"] > 60 >= few["tokens"]
    assert f"{many['vectors'] // L} segments one by one" in capsys.readouterr().out
