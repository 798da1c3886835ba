"""Tests of measure.py: FLOPs and bytes against torch's counter and sums by hand."""

import os

import pytest
import torch
from conftest import CPU
from sizes import TINY, L, flops_by_hand
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from paper import measure


def test_flops_are_those_of_torchs_counter():
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


def test_the_published_sizes():
    """Weights in millions, as the models' papers state them, and the two ratios of FLOPs by formula alone."""
    sizes, llms = {"gpt2": 124, "gpt2-large": 774, "gpt2-xl": 1558, "opt-125m": 125, "opt-6.7b": 6658,
                   "t5-small-lm-adapt": 77, "t5-large-lm-adapt": 783, "flan-t5-base": 248,
                   "flan-t5-xl": 2850}, {}
    with measure.no_weights():
        for name, millions in sizes.items():
            llms[name], _ = measure.build_random(name, "gpt2", L, torch.bfloat16)
            assert sum(p.numel() for p in llms[name].parameters()) / 1e6 == pytest.approx(millions, rel=0.005)
    for name, expected in (("gpt2-large", 3.64), ("gpt2-xl", 4.65)):
        by_hand = flops_by_hand(llms[name].config, 900, 56, llms["gpt2"].config, 100)
        assert by_hand["icl"] / by_hand["mend"] == pytest.approx(expected, abs=0.005)
