"""Tests of plan.py: FLOPs and memory of a training step against sums by hand and a real step."""

import argparse
import itertools

import pytest
import torch
from sizes import T_D, T_X, TINY, L, V, attention, matrices
from transformers import AutoConfig, AutoModelForCausalLM

from data import collate
from loading import checkpoint_layers
from paper import measure, plan, speed
from sources.pairs import settle_distiller


def plan_args():
    return argparse.Namespace(distill_len=L, demo_tokens=T_D, query_tokens=T_X)


def test_plan_by_hand(tiny):
    """Teacher: all tokens once. Distiller: three times. Student: forward, and back to its input."""
    found = {c: plan.plan_one("opt-6.7b", plan_args(), 2, c) for c in (False, True)}
    width, layers, width_s, layers_s = 64, 3, 32, 2

    def llm(tokens, seen):
        return matrices(width, layers, tokens) + attention(width, layers, tokens, seen)

    teacher = llm(T_D, T_D) + llm(T_X, T_D + T_X)
    student = sum(matrices(width, layers, n) * 2 + attention(width, layers, n, seen) * 3.5
                  for n, seen in ((L, L), (T_X, L + T_X)))
    distil = 3 * matrices(width_s, layers_s, T_D + L) + 3.5 * attention(width_s, layers_s, T_D + L, T_D + L)
    distil += 3 * 2 * width_s * width * L
    head = 2 * width * V * (3 * T_X + 2 * 4)
    assert found[False]["flops"] == pytest.approx(2 * (teacher + student + distil + head), rel=0.05)
    # checkpointing: all but a layer's last product again (4 of its 12 d^2), attention in one piece with 4.5
    # in place of 3.5, and the gradient of the first layer's queries, keys and values at x, whose embeddings
    # need none by themselves
    both = L + T_X
    again = matrices(width, layers, both) * 8 / 12 + 3 * 2 * width * width * T_X
    again += 4.5 * attention(width, layers, both, both)
    again -= 3.5 * (attention(width, layers, L, L) + attention(width, layers, T_X, both))
    assert found[True]["flops"] - found[False]["flops"] == 2 * again
    assert found[True]["bytes"]["alive"] < found[False]["bytes"]["alive"]
    matrix = 12 * width ** 2 * layers
    for r in found.values():
        assert r["peak_bytes"]["16 bit"] == sum(r["bytes"].values())
        # position embeddings are no matrices of a layer; one matrix of 4 d x d is unpacked
        assert r["peak_bytes"]["16 bit"] - r["peak_bytes"]["8 bit"] == matrix - 2 * 4 * width ** 2


@pytest.mark.parametrize("name", measure.T5_PAIRS)
def test_plan_of_t5_by_hand(tiny, name):
    """As above, but the student's backward pass reaches the encoder through the decoder's keys and values,
    and logits are those of the 4 answer tokens: once for the teacher, both ways for each of two losses."""
    found = plan.plan_one(name, plan_args(), 2, False)
    c, small = (AutoConfig.for_model(**TINY[n]) for n in (name, measure.T5_PAIRS[name]))
    y, inner = 4, c.num_heads * c.d_kv
    # a matrix of the attention, and of the gated layer
    project, gated = c.d_model * inner, c.d_model * c.d_ff

    def encoder(c, tokens, times=1, times_attention=1):
        inner = c.num_heads * c.d_kv
        matrices = 2 * (4 * c.d_model * inner + 3 * c.d_model * c.d_ff) * c.num_layers * tokens
        return times * matrices + times_attention * attention(inner, c.num_layers, tokens, tokens)

    # each decoder layer brings the encoder's x states to keys and values
    def llm(x, times=1, times_attention=1):
        matrices = 2 * c.num_layers * ((6 * project + 3 * gated) * y + 2 * project * x)
        return encoder(c, x, times, times_attention) + times * matrices \
            + times_attention * attention(inner, c.num_layers, y, y + x)

    teacher, student = llm(T_D + T_X - y), llm(L + T_X - y, 2, 3.5)
    # no vector before the first cross-attention
    student -= 2 * 5 * project * y + 2.5 * attention(inner, 1, y, y)
    distil = encoder(small, T_D + L, 3, 3.5) + 3 * 2 * small.d_model * c.d_model * L
    head = 2 * c.d_model * V * 5 * y
    assert found["flops"] == 2 * (teacher + student + distil + head)
    # in 8 bit the third matrix of each gated layer stays as it is, and the largest is unpacked
    matrices = c.num_layers * (12 * project + 2 * 2 * gated)
    assert found["peak_bytes"]["16 bit"] - found["peak_bytes"]["8 bit"] == matrices - 2 * max(project, gated)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_plan_of_t5_counts_a_real_step(tiny, checkpointing):
    """With weights, through `model.answer_states`; a shorter row is padded and changes no shape."""
    found = plan.plan_one("t5-large-lm-adapt", plan_args(), 2, checkpointing)
    llm, distiller = measure.build_random("t5-large-lm-adapt", "t5-small-lm-adapt", L, torch.bfloat16)
    if checkpointing:
        checkpoint_layers(llm)
    plan.let_attention_fuse(distiller.train())
    batch = collate([{"demo": [5] * (T_D - n), "queries": [([6] * (T_X - 4 - n), [[7] * 4])]}
                     for n in (0, 2)])
    with measure.Count() as count:
        speed.training_step(llm, distiller, batch, speed.counted_positions(llm, batch), "bf16")
    assert count.flops == found["flops"]
    assert count.peak == pytest.approx(found["bytes"]["alive"], rel=0.05)
    assert distiller.placeholders.grad.norm() > 0


@pytest.mark.parametrize("name", measure.OWN_PAIRS)
def test_plan_of_a_readers_own_llm_by_hand(tiny, name):
    """As the first, with fewer heads for keys and values, gated layers, and the LLM's own first layers as the
    distiller, whose embedding is the LLM's and so neither trained nor held twice."""
    found, c = plan.plan_one(name, plan_args(), 2, False), AutoConfig.for_model(**TINY[name])
    n = int(measure.OWN_PAIRS[name].removeprefix("layers:"))
    heads, pairs = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    weights = c.hidden_size * (2 * heads + 2 * pairs + 3 * c.intermediate_size)

    def layers(count, tokens, seen, times=1, times_attention=1):
        return times * 2 * count * weights * tokens + times_attention * attention(heads, count, tokens, seen)

    all_of, head = c.num_hidden_layers, 2 * c.hidden_size * V * (3 * T_X + 2 * 4)
    teacher = layers(all_of, T_D, T_D) + layers(all_of, T_X, T_D + T_X)
    student = layers(all_of, L, L, 2, 3.5) + layers(all_of, T_X, L + T_X, 2, 3.5)
    distil = layers(n, T_D + L, T_D + L, 3, 3.5)
    assert found["flops"] == pytest.approx(2 * (teacher + student + distil + head), rel=0.05)
    norms = (2 * c.hidden_size + (2 * c.head_dim if c.model_type == "qwen3" else 0)) * n + c.hidden_size
    trained = weights * n + norms + L * c.hidden_size
    assert found["bytes"]["distiller"] == (4 + 8) * trained


@pytest.mark.parametrize("name, parameters", [("Llama-3.2-1B", 1_235_814_400), ("Qwen3-0.6B", 596_049_920),
                                              ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200),
                                              ("Llama-3.1-8B", 8_030_261_248),
                                              ("Llama-3.1-70B", 70_553_706_496),
                                              ("Qwen3-32B", 32_762_123_264)])
def test_the_sizes_written_down_are_the_published_ones(name, parameters):
    """The parameters that each model's card names."""
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(**measure.CONFIGS[name]))
    assert sum(p.numel() for p in llm.parameters()) == parameters


def test_own_pairs_are_those_that_the_preset_settles(tmp_path):
    for name, distiller in measure.OWN_PAIRS.items():
        AutoConfig.for_model(**measure.CONFIGS[name]).save_pretrained(tmp_path / name)
        args = argparse.Namespace(llm=str(tmp_path / name), distiller="gpt2", filled_in=["distiller"],
                                  template="space")
        settle_distiller(args)
        assert args.distiller == distiller


def test_an_llm_that_was_given_is_planned_alone(tiny, tmp_path, capsys, monkeypatch):
    """With the distiller given, else the one that the training scripts would settle on."""
    asked, bytes_ = [], {"16 bit": 1e9, "8 bit": 1e9}
    step = {"flops": 6e12, "peak_bytes": bytes_}
    monkeypatch.setattr(plan, "plan_one", lambda *a: (asked.append(a), dict(step))[1])
    AutoConfig.for_model(**TINY["Llama-3.2-1B"]).save_pretrained(tmp_path / "my-llama")
    own = str(tmp_path / "my-llama")
    for llm, distiller, filled_in, expected in (
            (own, "layers:4", [], "layers:4"), (own, "gpt2", ["distiller"], "layers:2"),
            ("gpt2-xl", "gpt2", ["distiller"], "gpt2"), ("gpt2", "gpt2", ["distiller"], "gpt2"),
            ("meta-llama/Llama-3.1-8B", "gpt2", ["distiller"], "layers:3"),
            ("Qwen/Qwen3-0.6B", "gpt2", ["distiller"], "layers:9"),
            ("flan-t5-xl", "gpt2", ["distiller"], "flan-t5-base")):
        args = argparse.Namespace(**vars(plan_args()), llm=llm, distiller=distiller, template="space",
                                  filled_in=filled_in)
        found = plan.plan(args)
        assert [(r["llm"], r["distiller"]) for r in found] == [(llm, expected)] * 4
        assert [(a[0], a[2:]) for a in asked[-4:]] == [
            (llm, (1, False, expected)), (llm, (1, True, expected)), (llm, (8, False, expected)),
            (llm, (8, True, expected))]
        assert found[0]["hours"] == 1.0  # 6 TFLOP, 30,000 times, at 50 TFLOP/s
    assert "an estimate for 30,000 steps at 50 TFLOP/s, not run" in capsys.readouterr().out


def test_plan_counts_fused_attention(tiny):
    """The distiller's scores alone would take 2 layers x 4 heads x 1,005^2 x 2 bytes."""
    args = argparse.Namespace(distill_len=L, demo_tokens=1000, query_tokens=T_X)
    assert plan.plan_one("gpt2-large", args, 1, False)["bytes"]["alive"] < 2 * 4 * 1005 ** 2 * 2


def test_plan_says_which_cards_fit(tiny, monkeypatch, capsys):
    peaks = itertools.cycle([14.6, 14.4, 22, 38, 78.6, 1])
    monkeypatch.setattr(plan, "plan_one", lambda *_: {
        "flops": 1, "peak_bytes": {"16 bit": next(peaks) * 1e9, "8 bit": 1e9}})
    found = plan.plan(plan_args())
    cards = [16, 24, 40, 80]
    assert [r["fits_gb"]["16 bit"] for r in found][:6] == [cards[1:], cards, cards[1:], cards[2:], [], cards]
    assert [(r["llm"], r["batch_size"], r["checkpointing"]) for r in found[:5]] == [
        ("gpt2-large", 1, False), ("gpt2-large", 1, True), ("gpt2-large", 8, False), ("gpt2-large", 8, True),
        ("gpt2-xl", 1, False)]
    assert [r["llm"] for r in found[::4]] == ["gpt2-large", "gpt2-xl", "opt-6.7b", "t5-large-lm-adapt",
                                              "flan-t5-xl", "Llama-3.2-1B", "Qwen3-0.6B"]
    assert "none" in capsys.readouterr().out


def test_the_plan_of_sharded_layers_by_hand(tiny, capsys):
    """What is not in the layers is whole on each card, and the layers are in n parts, with two gathered."""
    found = plan.plan_sharded(plan_args())
    assert [r["llm"] for r in found] == ["Llama-3.1-8B", "Qwen3-32B", "Llama-3.1-70B"]
    layer = 2 * (96 * 96 * 2 + 2 * 96 * 48 + 3 * 96 * 192 + 2 * 96)  # bytes: attention, the gated MLP, norms
    for r in found:
        one = layer + (2 * 2 * 24 if r["llm"] == "Qwen3-32B" else 0)  # norms of queries and keys
        whole = r["peak_bytes"][1]
        for n in (2, 4, 8):
            assert r["peak_bytes"][n] == pytest.approx(whole - 9 * one * (1 - 1 / n) + 2 * one)
        assert r["fits_gb"][1] == [24, 80]
    assert "8 card(s)" in capsys.readouterr().out
