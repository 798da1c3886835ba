"""Tests of bench.py, speed.py and measure.py: counts against sums by hand, losses against plain.py."""

import argparse
import itertools
import json
import os

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

import bench
import data
import plain
import score
from common import UserError
from data import collate
from loading import build_distiller, checkpoint_layers, load_llm, make_encoder
from paper import figures, measure, plan, speed
from sources.tasks import load_tasks
from sources.text import Tokenizer

CPU = torch.device("cpu")
TINY = {  # every name that the code asks for, so small that a count takes no time; widths and depths all differ
    "gpt2": {"model_type": "gpt2", "n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 500},
    "gpt2-large": {"model_type": "gpt2", "n_embd": 64, "n_layer": 4, "n_head": 4, "vocab_size": 500},
    "gpt2-xl": {"model_type": "gpt2", "n_embd": 80, "n_layer": 5, "n_head": 5, "vocab_size": 500},
    "opt-125m": {"model_type": "opt", "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 128,
                 "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 500},
    "opt-6.7b": {"model_type": "opt", "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 256,
                 "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 500},
    "t5-small-lm-adapt": {**measure.T5, "d_model": 48, "d_ff": 80, "num_layers": 2, "num_heads": 3, "d_kv": 8,
                          "vocab_size": 500},
    "t5-large-lm-adapt": {**measure.T5, "d_model": 64, "d_ff": 96, "num_layers": 4, "num_heads": 4, "d_kv": 8,
                          "vocab_size": 500},
    "flan-t5-base": {**measure.T5, "d_model": 32, "d_ff": 64, "num_layers": 3, "num_heads": 2, "vocab_size": 500},
    "flan-t5-xl": {**measure.T5, "d_model": 80, "d_ff": 160, "num_layers": 5, "num_heads": 4, "vocab_size": 500},
}
T_D, T_X, L, V = 30, 9, 5, 500
WIDTH, LAYERS, WIDTH_S, LAYERS_S = 64, 4, 48, 2  # of gpt2-large and gpt2 above


@pytest.fixture
def tiny(monkeypatch):
    for name, config in TINY.items():
        monkeypatch.setitem(measure.CONFIGS, name, config)


def matrices(width, layers, tokens):
    """4 d^2 of attention and 8 d^2 of the two others, a multiplication and an addition each."""
    return 2 * 12 * width * width * layers * tokens


def attention(width, layers, tokens, seen):
    """Scores and weighted sum: 2 d FLOPs each for a pair."""
    return 4 * width * layers * tokens * seen


# ---------------------------------------------------------------------------------------------------------------------
# What measures


def test_flops_are_those_of_torchs_counter(tiny):
    """On a path that torch's own counter sees whole: attention as two products."""
    config = AutoConfig.for_model(**TINY["gpt2-large"], attn_implementation="eager")
    llm = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.zeros(2, 7, dtype=torch.long)
    with FlopCounterMode(display=False) as torchs:
        llm(input_ids=ids).logits.sum().backward()
    with measure.Count() as ours:
        llm(input_ids=ids).logits.sum().backward()
    assert ours.flops == torchs.get_total_flops() > 0


def test_flops_of_cpu_attention_forward_and_backward():
    """2 products forward, 5 backward (the scores are made again): B = 2, 3 heads of 8, 5 queries, 11 keys."""
    q, k, v = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (5, 11, 11))
    product = 2 * 2 * 3 * 5 * 11 * 8
    with measure.Count() as forward:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    with measure.Count() as backward:
        out.sum().backward()
    assert (forward.flops, backward.flops) == (2 * product, 5 * product)


def test_peak_is_what_is_alive_at_once():
    """1,000 floats are 4,000 bytes: views, what stood before and what is freed do not count."""
    before = torch.zeros(1000)
    with measure.Count() as count:
        a = before + 1                      # 4,000
        b = a[:10].view(2, 5).t()           # shares a's memory
        before.view(10, 100).t()            # shares older memory
        del a, b
        c = before * 2                      # 4,000 again, a is gone
        d = c + 1                           # 8,000
        c.mul_(2)                           # in place
    assert (count.peak, count.live) == (8000, 8000) and d.numel() == 1000
    del c, d
    assert count.live == 0


def test_interleaved_warms_up_and_takes_turns():
    calls = []
    times = measure.interleaved({n: (lambda n=n: calls.append(n)) for n in "ab"}, 3, CPU)
    assert calls == list("abababab") and {n: len(t) for n, t in times.items()} == {"a": 3, "b": 3}


def allocate(n_bytes: int):
    def run():
        torch.ones(n_bytes // 4)
        return os.getpid()
    return run


@pytest.mark.slow
def test_peak_in_child_sees_a_tensor_that_is_gone():
    found = measure.peak_in_child(allocate, 400_000_000)
    assert found["above_bytes"] == pytest.approx(400_000_000, rel=0.05) and found["result"] != os.getpid()


# ---------------------------------------------------------------------------------------------------------------------
# The seven methods


@pytest.mark.parametrize("all_logits", [True, False])
def test_flops_of_the_seven_methods_by_hand(tiny, all_logits):
    rows = bench.counted("gpt2-large", T_D, T_X, L, all_logits)

    def llm(tokens, seen):
        return matrices(WIDTH, LAYERS, tokens) + attention(WIDTH, LAYERS, tokens, seen)

    def head(tokens):
        return 2 * WIDTH * V * (tokens if all_logits else 1)

    distil = matrices(WIDTH_S, LAYERS_S, T_D + L) + attention(WIDTH_S, LAYERS_S, T_D + L, T_D + L)
    distil += 2 * WIDTH_S * WIDTH * L
    behind_vectors = llm(L + T_X, L + T_X) + head(L + T_X)
    query = {"zero_shot": llm(T_X, T_X) + head(T_X), "icl": llm(T_D + T_X, T_D + T_X) + head(T_D + T_X),
             "icl_cached": llm(T_X, T_D + T_X) + head(T_X), "prompt_tuning": behind_vectors,
             "mend": distil + behind_vectors, "mend_vectors": behind_vectors,
             "mend_kv": llm(T_X, L + T_X) + head(T_X)}
    prepare = {"zero_shot": 0, "icl": 0, "icl_cached": llm(T_D, T_D), "prompt_tuning": 0, "mend": 0,
               "mend_vectors": distil, "mend_kv": distil + llm(L, L)}
    assert {n: r["query_flops"] for n, r in rows.items()} == pytest.approx(query, rel=0.005)
    assert {n: r["prepare_flops"] for n, r in rows.items()} == pytest.approx(prepare, rel=0.005)


def flops_by_hand(config, demo_tokens: int, query_tokens: int, distiller_config, distill_len: int) -> dict:
    """ICL's and MEND's FLOPs with all logits from the published sizes: the check of what is counted.

    A layer of width d has 12 d^2 weights, 2 FLOPs each a token, and 4 d FLOPs for each pair of positions; the head has
    2 d V a token.
    """
    def layers(c, tokens: int) -> float:
        return c.num_hidden_layers * (24 * c.hidden_size ** 2 * tokens + 4 * c.hidden_size * tokens ** 2)

    def head(tokens: int) -> float:
        return 2 * config.hidden_size * config.vocab_size * tokens

    icl, mend = demo_tokens + query_tokens, distill_len + query_tokens
    project = 2 * distiller_config.hidden_size * config.hidden_size * distill_len
    return {"icl": layers(config, icl) + head(icl),
            "mend": layers(distiller_config, demo_tokens + distill_len) + project + layers(config, mend) + head(mend)}


@pytest.mark.parametrize("name", ["gpt2-large", "gpt2-xl", "opt-6.7b"])
def test_the_formulas_by_hand_hold_to_two_percent(tiny, name):
    rows = bench.counted(name, T_D, T_X, L, True)
    with measure.no_weights():
        llm, distiller = measure.build_random(name, measure.PAIRS[name], L, torch.bfloat16)
        by_hand = flops_by_hand(llm.config, T_D, T_X, distiller.backbone.config, L)
    assert {n: rows[n]["query_flops"] for n in ("icl", "mend")} == pytest.approx(by_hand, rel=0.02)


def test_the_published_sizes():
    """Weights in millions, as the models' papers state them, and the two ratios of FLOPs by formula alone."""
    sizes, llms = {"gpt2": 124, "gpt2-large": 774, "gpt2-xl": 1558, "opt-125m": 125, "opt-6.7b": 6658,
                   "t5-small-lm-adapt": 77, "t5-large-lm-adapt": 783, "flan-t5-base": 248, "flan-t5-xl": 2850}, {}
    with measure.no_weights():
        for name, millions in sizes.items():
            llms[name], _ = measure.build_random(name, "gpt2", L, torch.bfloat16)
            assert sum(p.numel() for p in llms[name].parameters()) / 1e6 == pytest.approx(millions, rel=0.005)
    for name, expected in (("gpt2-large", 3.64), ("gpt2-xl", 4.65)):
        by_hand = flops_by_hand(llms[name].config, 900, 56, llms["gpt2"].config, 100)
        assert by_hand["icl"] / by_hand["mend"] == pytest.approx(expected, abs=0.005)


def test_what_is_stored_and_the_memory_beside_it(tiny):
    """16 bit: two bytes a number; keys and values: 2 x layers x tokens x width."""
    rows = bench.counted("gpt2-large", T_D, T_X, L, True)
    kv = 2 * LAYERS * WIDTH * 2
    assert {n: r["stored_bytes"] for n, r in rows.items()} == {
        "zero_shot": 0, "icl": 4 * T_D, "icl_cached": kv * T_D, "prompt_tuning": L * WIDTH * 2, "mend": 4 * T_D,
        "mend_vectors": L * WIDTH * 2, "mend_kv": kv * L}
    llm_bytes = 2 * (12 * WIDTH ** 2 * LAYERS + 13 * WIDTH * LAYERS + 2 * WIDTH + (V + 1024) * WIDTH)
    distiller_bytes = 4 * (12 * WIDTH_S ** 2 * LAYERS_S + 13 * WIDTH_S * LAYERS_S + 2 * WIDTH_S + (V + 1024) * WIDTH_S
                           + L * WIDTH_S + (WIDTH_S + 1) * WIDTH)
    logits = 4 * V * (T_D + T_X)
    assert llm_bytes + logits < rows["icl"]["peak_bytes"] < llm_bytes + 4 * logits
    # what is stored, and the copy of it that reading a query makes
    assert rows["icl_cached"]["peak_bytes"] - rows["mend_kv"]["peak_bytes"] == pytest.approx(2 * kv * (T_D - L), rel=0.2)
    assert rows["mend"]["peak_bytes"] > llm_bytes + distiller_bytes > rows["mend_vectors"]["peak_bytes"]


def test_counting_needs_no_weights(tiny):
    """The same figures from tensors with data."""
    with measure.no_weights():
        llm, distiller = measure.build_random("gpt2-large", "gpt2", L, torch.float32)
        without = bench.count_methods(llm, distiller, T_D, T_X, "fp32", True)
    llm, distiller = measure.build_random("gpt2-large", "gpt2", L, torch.float32)
    assert bench.count_methods(llm, distiller, T_D, T_X, "fp32", True) == without


def test_all_ways_of_reading_give_the_plain_logits(llm_folder):
    llm = load_llm(str(llm_folder), CPU, torch.float32)
    distiller = build_distiller("layers:2", llm, L, "matched", 0).eval()
    ids = torch.randint(0, llm.config.vocab_size, (1, T_D + T_X), generator=torch.Generator().manual_seed(0))
    demo, query = ids[:, :T_D], ids[:, T_D:]
    with torch.no_grad():
        logits, last = ({name: read(prepare()) for name, (prepare, read) in
                         bench.methods(llm, distiller, demo, query, "fp32", every).items()} for every in (True, False))
        prefixes = {"icl": plain.embed(llm, demo[0].tolist()), "mend": plain.Distiller.forward(distiller, demo[0].tolist()),
                    "zero_shot": plain.embed(llm, []), "prompt_tuning": plain.embed(llm, [demo[0, 0].item()] * L)}
        # the last of the logits are the prediction after the query: the token there does not matter
        plain_logits = {name: plain.read(llm, prefix, query[0].tolist(), [0]) for name, prefix in prefixes.items()}
    for name in bench.METHODS:
        expected = plain_logits[{"icl_cached": "icl", "mend_vectors": "mend", "mend_kv": "mend"}.get(name, name)]
        n = min(len(expected), len(logits[name]), T_X)
        torch.testing.assert_close(logits[name][-n:], expected[-n:], atol=2e-4, rtol=1e-3)
        torch.testing.assert_close(last[name], expected[-1:], atol=2e-4, rtol=1e-3)
    assert len(logits["icl"]) == T_D + T_X and len(logits["mend"]) == L + T_X


def test_pays_off_after():
    """Distilling costs 100 and saves 40 a query; cached ICL costs 300 at first and 5 more a query; a dearer one never."""
    assert bench.pays_off_after(100, 60, 0, 100) == 2.5
    assert bench.pays_off_after(100, 60, 300, 65) == 0
    assert bench.pays_off_after(100, 60, 0, 60) is None and bench.pays_off_after(100, 60, 0, 50) is None
    rows = {"mend_vectors": (100, 60), "mend_kv": (110, 40), "icl": (0, 100), "icl_cached": (90, 44)}
    rows = {n: {"prepare_flops": p, "query_flops": q} for n, (p, q) in rows.items()}
    assert bench.pay_off(rows) == {"mend_vectors against icl": 2.5, "mend_vectors against icl_cached": None,
                                   "mend_kv against icl": 110 / 60, "mend_kv against icl_cached": 5}


def test_crossing():
    assert bench.crossing([0, 10, 20], [0, 10, 20], [15, 15, 15]) == 15
    assert bench.crossing([0, 10], [5, 6], [7, 6]) == 10
    assert bench.crossing([0, 10], [1, 2], [3, 4]) is None and bench.crossing([0, 10], [1, 2], [1, 2]) is None


# ---------------------------------------------------------------------------------------------------------------------
# Training and scoring


def speed_setting(llama, tasks_dir):
    args = argparse.Namespace(template="space", context_len=900, distill_len=4, dtype="fp32", seed=100, k=4)
    llm = load_llm(str(llama), CPU, torch.float32)
    distiller = build_distiller("layers:2", llm, 4, "matched", 0)
    encoder = make_encoder(args, Tokenizer(str(llama)), llm, distiller)
    return args, llm, distiller, load_tasks(str(tasks_dir), "class_to_class"), encoder


def plain_loss(llm, distiller, demo, query):
    """Eq. (4) of one query, with lambda = 1."""
    x, (y,) = query
    teacher, student = plain.teacher_and_student(llm, demo, plain.Distiller.forward(distiller, demo), x, y)
    return plain.finetune_loss(plain.pred_loss(student[-len(y):], y), plain.distill_loss(student, teacher), 1.0)


def test_the_step_that_is_timed_is_eq_4(llama, tasks_dir):
    args, llm, distiller, tasks, encoder = speed_setting(llama, tasks_dir)
    (row,) = speed.typical_rows(tasks, encoder, args.seed, args.k, 1, 1)
    batch = collate([row])
    loss = speed.training_step(llm, distiller, batch, speed.counted_positions(llm, batch), "fp32")
    gradient = {n: p.grad.clone() for n, p in distiller.named_parameters() if p.grad is not None}
    distiller.zero_grad()
    expected = plain_loss(llm, distiller, row["demo"], row["queries"][0])
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, p in distiller.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(gradient[name], p.grad, atol=1e-5, rtol=1e-3)


def test_plain_step_is_the_mean_over_queries(llama, tasks_dir):
    args, llm, distiller, tasks, encoder = speed_setting(llama, tasks_dir)
    rows = speed.typical_rows(tasks, encoder, args.seed, args.k, 2, 2)
    speed.plain_step(llm, distiller, rows, "fp32")
    found = distiller.placeholders.grad.clone()
    distiller.zero_grad()
    losses = [plain_loss(llm, distiller, row["demo"], query) for row in rows for query in row["queries"]]
    torch.stack(losses).mean().backward()
    assert len(losses) == 4
    torch.testing.assert_close(found, distiller.placeholders.grad, atol=1e-6, rtol=1e-4)


def test_training_speed(llama, tasks_dir, monkeypatch):
    """From made-up times: ours 2 s, plain 7 s, a product of 4,096 in 1 s."""
    args, llm, distiller, tasks, encoder = speed_setting(llama, tasks_dir)
    rows = speed.typical_rows(tasks, encoder, args.seed, args.k, 2, 2)
    times = {"matmul": [1.0, 1.0], "matmul again": [1.0, 1.0], "ours": [2.0, 2.0], "plain": [7.0, 7.0]}
    monkeypatch.setattr(speed, "interleaved", lambda functions, *_: (functions["ours"](), times)[1])
    found = speed.training_speed(llm, distiller, rows, "fp32", 2)
    tokens = sum(len(x) + len(y) for row in rows for x, (y,) in row["queries"])
    assert found["query_tokens"] == tokens and found["ratio"] == 3.5
    assert found["tokens_per_second"] == {"ours": tokens / 2, "plain": tokens / 7}
    assert found["share"] == pytest.approx(found["flops"] / 2 / (2 * 4096 ** 3)) and found["flops"] > 0
    assert distiller.placeholders.grad is None


def test_the_typical_step_is_of_middle_size(llama, tasks_dir):
    *_, tasks, encoder = speed_setting(llama, tasks_dir)
    rows_of = data.step_rows(lambda first, n: [data.sample_row(tasks, encoder, 100, i, 4, 1)
                                                for i in range(first, first + n)], 100, 2)
    sizes = sorted(sum(len(r["demo"]) for r in rows_of(step)) for step in range(64))
    assert sum(len(r["demo"]) for r in speed.typical_rows(tasks, encoder, 100, 4, 2, 1)) == sizes[32]


def test_padding_by_hand(monkeypatch):
    """Two lengths alternate: as drawn half of the short rows is padding, by length none is."""
    def row(i):
        return {"demo": [0] * (10 if i % 2 else 20), "queries": [([0], [[0]])]}
    monkeypatch.setattr(speed, "sample_row", lambda tasks, encoder, seed, i, k, queries: row(i))
    found = speed.padding(None, None, 0, 16, 1, batch_size=4)
    assert found == {"by_length": 0, "as_drawn": pytest.approx(20 / (4 * 22))}


def test_the_losses_memory_and_gradient():
    peaks, gradients = {}, {}
    for kind in ("plain", "chunked"):
        run = speed.prepare_loss(kind, 1024, 16, 2000)
        with measure.Count() as count:
            gradients[kind] = run()
        peaks[kind] = count.peak
    assert peaks["plain"] > 4 * peaks["chunked"] > 0
    torch.testing.assert_close(gradients["plain"], gradients["chunked"], atol=1e-8, rtol=1e-4)
    assert gradients["plain"].abs().max() > 1e-5


@pytest.mark.slow
def test_the_losses_memory_in_processes_of_their_own():
    found = speed.loss_memory(1024, 64, 20000)
    assert found["ratio"] > 3 and found["gradient_difference"] < 1e-5


def test_scoring_speed_compares_equal_scores(llama, tasks_dir, monkeypatch):
    args, llm, distiller, tasks, encoder = speed_setting(llama, tasks_dir)
    monkeypatch.setattr(speed, "interleaved", lambda *_, **__: {"plain": [2.0, 2.0], "cached": [4.0, 4.0]})
    found = speed.scoring_speed(llm, distiller, tasks, encoder, args, n=20, n_plain=2, options=3)
    for method in ("icl", "mend"):
        assert found[method]["score_difference"] < 1e-4
        assert found[method]["seconds"] == {"plain": 20.0, "cached": 4.0} and found[method]["ratio"] == 5.0
    real = score.score_options
    monkeypatch.setattr(speed, "score_options", lambda *a: real(*a) + torch.tensor([0.0, 0.1, 0.0]))
    found = speed.scoring_speed(llm, distiller, tasks, encoder, args, n=20, n_plain=2, options=3)
    assert found["icl"]["score_difference"] > 0.09


def test_scoring_needs_a_task_that_fits(tasks_dir):
    tasks = load_tasks(str(tasks_dir), "class_to_class")
    assert speed.scoring_task(tasks, 100, 24, 3)[0] == tasks.test[0]
    for n, options in ((25, 3), (24, 4)):
        with pytest.raises(UserError, match=f"has {n} test queries of {options} options"):
            speed.scoring_task(tasks, 100, n, options)


def plan_args():
    return argparse.Namespace(distill_len=L, demo_tokens=T_D, query_tokens=T_X)


def test_plan_by_hand(tiny):
    """Teacher: all tokens once. Distiller: three times. Student: forward, and backward to its input without weights."""
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
    # checkpointing: all but a layer's last product again (4 of its 12 d^2), attention in one piece with 4.5 in place of 3.5,
    # and the gradient of the first layer's queries, keys and values at x, whose embeddings need none by themselves
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
    """As above, but the student's backward pass reaches the encoder through the decoder's keys and values, and logits
    are those of the 4 answer tokens: once for the teacher, and forward and backward for each of two losses."""
    found = plan.plan_one(name, plan_args(), 2, False)
    c, small = (AutoConfig.for_model(**TINY[n]) for n in (name, measure.T5_PAIRS[name]))
    y, inner = 4, c.num_heads * c.d_kv
    project, gated = c.d_model * inner, c.d_model * c.d_ff  # a matrix of the attention, and of the gated layer

    def encoder(c, tokens, times=1, times_attention=1):
        inner = c.num_heads * c.d_kv
        matrices = 2 * (4 * c.d_model * inner + 3 * c.d_model * c.d_ff) * c.num_layers * tokens
        return times * matrices + times_attention * attention(inner, c.num_layers, tokens, tokens)

    def llm(x, times=1, times_attention=1):  # each decoder layer brings the encoder's x states to keys and values
        matrices = 2 * c.num_layers * ((6 * project + 3 * gated) * y + 2 * project * x)
        return encoder(c, x, times, times_attention) + times * matrices \
            + times_attention * attention(inner, c.num_layers, y, y + x)

    teacher, student = llm(T_D + T_X - y), llm(L + T_X - y, 2, 3.5)
    student -= 2 * 5 * project * y + 2.5 * attention(inner, 1, y, y)  # no vector before the first cross-attention
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
    batch = collate([{"demo": [5] * (T_D - n), "queries": [([6] * (T_X - 4 - n), [[7] * 4])]} for n in (0, 2)])
    with measure.Count() as count:
        speed.training_step(llm, distiller, batch, speed.counted_positions(llm, batch), "bf16")
    assert count.flops == found["flops"]
    assert count.peak == pytest.approx(found["bytes"]["alive"], rel=0.05)
    assert distiller.placeholders.grad.norm() > 0


def test_plan_counts_fused_attention(tiny):
    """With 1,000 demonstration tokens, the distiller's scores alone would take 2 layers x 4 heads x 1,005^2 x 2 bytes."""
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
    assert [r["llm"] for r in found[::4]] == ["gpt2-large", "gpt2-xl", "opt-6.7b", "t5-large-lm-adapt", "flan-t5-xl"]
    assert "none" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_here(flags, capsys):
    found = bench.main([*flags, "--demo-tokens", "20", "--query-tokens", "6", "--repeats", "2"])
    assert last_line(capsys) == found and list(found["rows"]) == list(bench.METHODS)
    for row in found["rows"].values():
        low, high = row["seconds_range"]
        assert 0 < low <= row["seconds"] <= high


@pytest.mark.slow
def test_here_measures_memory_in_children(flags, tiny):
    found = bench.main([*flags, "--demo-tokens", "20", "--query-tokens", "6", "--repeats", "1", "--memory"])
    assert all(r["measured_peak_bytes"] > 5e7 for r in found["rows"].values())


def test_fig3_and_its_pictures(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "CONTEXTS", {"class_to_class": 30, "qa_to_qa": 50})
    monkeypatch.setattr(bench, "SCALING", {"demo_tokens": (2, 8), "distill_len": (5, 200)})
    monkeypatch.delitem(measure.PAIRS, "opt-6.7b"), monkeypatch.delitem(measure.PAIRS, "gpt2-large")
    flags = ["--preset", "paper", "--device", "cpu", "--dtype", "fp32", "--distill-len", "5", "--query-tokens", "9"]
    final = bench.main(["--fig3", *flags, "--repeats", "1", "--out", str(tmp_path / "fig3.json")])
    assert last_line(capsys) == final and "settings" not in final and final["icl_over_mend_seconds"][1] > 0
    saved = json.loads((tmp_path / "fig3.json").read_text())
    assert len(saved["settings"]) == 2 and len(saved["scaling"]) == 1 and len(saved["measured"]) == 2
    rows = next(s["rows"] for s in saved["settings"] if (s["llm"], s["demo_tokens"]) == ("gpt2-xl", 50))
    assert rows == bench.counted("gpt2-xl", 50, 9, 5, True)
    assert saved["icl_over_mend_flops"]["gpt2-xl"][1] == rows["icl"]["query_flops"] / rows["mend"]["query_flops"]
    (scaling,) = saved["scaling"]
    assert scaling["demo_tokens"]["x"] == [2, 8, 1024 - 9] and scaling["distill_len"]["x"] == [5]  # 900 + 200: too long
    last = bench.counted("gpt2-xl", 1024 - 9, 9, 5, False, ["mend"])
    assert scaling["demo_tokens"]["flops"]["mend"][2] == last["mend"]["query_flops"]
    at = scaling["demo_tokens"]["crossings"]
    assert at["icl_cached and mend_kv"] == pytest.approx(5) and 5 < at["icl and mend"] < 8
    for name in ("fig3", "scaling"):
        drawn = figures.main([name, "--results", str(tmp_path / "fig3.json"), "--out", str(tmp_path)])
        assert drawn["files"] == [str(tmp_path / f"{name}{kind}") for kind in (".png", ".svg")]
    assert drawn["drawn"]["gpt2-xl"]["demo_tokens"] == at
    assert (tmp_path / "fig3.png").read_bytes()[:4] == b"\x89PNG" and "<svg" in (tmp_path / "scaling.svg").read_text()


def test_suite_states_every_ratio(flags, tiny, tmp_path, monkeypatch, capsys):
    loss = {"ratio": 3.0, "bytes": {"plain": 3e6, "chunked": 1e6}, "tokens": 1024, "gradient_difference": 1e-7}
    monkeypatch.setattr(speed, "loss_memory", lambda: loss)
    scoring = speed.scoring_speed
    monkeypatch.setattr(speed, "scoring_speed", lambda *a, **k: scoring(*a, **k, n=12, n_plain=2, options=3))
    monkeypatch.setattr(speed, "SQUARE", 64)
    monkeypatch.setattr(speed, "thread_settings", lambda *_: [{"threads": 1, "GOMP_SPINCOUNT": "100", "seconds": 1.0}])
    final = bench.main(["--suite", *flags, "--k", "4", "--repeats", "1", "--out", str(tmp_path / "bench.json")])
    saved = json.loads((tmp_path / "bench.json").read_text())
    assert {"scoring_cached_over_plain", "training_q4_over_plain", "loss_memory_plain_over_chunked",
            "flops_icl_over_mend_gpt2_large", "flops_icl_over_mend_gpt2_xl", "training_share_of_matmul_rate"} \
        <= saved["ratios"].keys() == final["ratios"].keys()
    assert saved["commit"] and saved["machine"] and saved["command"].startswith("python bench.py --suite")
    rows = saved["details"]["methods_gpt2-xl"]
    assert saved["ratios"]["flops_icl_over_mend_gpt2_xl"] == rows["icl"]["query_flops"] / rows["mend"]["query_flops"]
    details = saved["details"]
    assert saved["ratios"]["scoring_cached_over_plain"] == min(details["scoring"][m]["ratio"] for m in ("icl", "mend"))
    assert details["training_gpt2_large_bf16"]["sets"] == 1 and details["training_smollm2_fp32"]["sets"] == 2
    assert "| loss memory plain over chunked | 3.00 | 4.00, missed | 1 against 3 MB" in capsys.readouterr().out


def test_flag_faults(flags, tiny):
    with pytest.raises(UserError, match=r"--demo-tokens is 0.*--query-tokens is 2.*--repeats is 0.*exclude each other"):
        bench.main([*flags, "--demo-tokens", "0", "--query-tokens", "2", "--repeats", "0", "--random-init",
                    "--checkpoint", "x"])
    with pytest.raises(UserError, match="passes the 2048 tokens"):
        bench.main([*flags, "--demo-tokens", "2045", "--repeats", "1"])
    with pytest.raises(UserError, match="t5-large-lm-adapt is an encoder-decoder"):
        bench.main([*flags, "--llm", "t5-large-lm-adapt", "--distiller", "t5-small-lm-adapt", "--random-init"])
    with pytest.raises(UserError, match="make it with `python bench.py"):
        figures.main(["fig3", "--results", "nowhere.json"])
