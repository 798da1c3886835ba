"""Tests of speed.py: what is timed is Eq. (4), and the figures come from the times."""

import argparse

import pytest
import torch

import data
import plain
import score
from common import UserError
from data import collate
from loading import build_distiller, make_formatter
from paper import measure, speed


@pytest.fixture
def parts(llama_llm, tokenizer, tiny_tasks):
    args = argparse.Namespace(template="space", context_len=900, distill_len=4, dtype="fp32", seed=100, k=4)
    distiller = build_distiller("layers:2", llama_llm, 4, "matched", 0)
    return args, llama_llm, distiller, tiny_tasks, make_formatter(args, tokenizer, llama_llm, distiller)


def plain_loss(llm, distiller, demo, query):
    """Eq. (4) of one query, with lambda = 1."""
    x, (y,) = query
    teacher, student = plain.teacher_and_student(llm, demo, plain.Distiller.forward(distiller, demo), x, y)
    return plain.finetune_loss(plain.pred_loss(student[-len(y):], y), plain.distill_loss(student, teacher),
                               1.0)


def test_the_step_that_is_timed_is_eq_4(parts):
    args, llm, distiller, tasks, formatter = parts
    (row,) = speed.typical_rows(tasks, formatter, args.seed, args.k, 1, 1)
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


def test_plain_step_is_the_mean_over_queries(parts):
    args, llm, distiller, tasks, formatter = parts
    rows = speed.typical_rows(tasks, formatter, args.seed, args.k, 2, 2)
    speed.plain_step(llm, distiller, rows, "fp32")
    found = distiller.placeholders.grad.clone()
    distiller.zero_grad()
    losses = [plain_loss(llm, distiller, row["demo"], query) for row in rows for query in row["queries"]]
    torch.stack(losses).mean().backward()
    assert len(losses) == 4
    torch.testing.assert_close(found, distiller.placeholders.grad, atol=1e-6, rtol=1e-4)


def test_training_speed(parts, monkeypatch):
    """From made-up times: ours 2 s, plain 7 s, a product of 4,096 in 1 s."""
    args, llm, distiller, tasks, formatter = parts
    rows = speed.typical_rows(tasks, formatter, args.seed, args.k, 2, 2)
    times = {"matmul": [1.0, 1.0], "matmul again": [1.0, 1.0], "ours": [2.0, 2.0], "plain": [7.0, 7.0]}
    monkeypatch.setattr(speed, "interleaved", lambda functions, *_: (functions["ours"](), times)[1])
    found = speed.training_speed(llm, distiller, rows, "fp32", 2)
    tokens = sum(len(x) + len(y) for row in rows for x, (y,) in row["queries"])
    assert found["query_tokens"] == tokens and found["ratio"] == 3.5
    assert found["tokens_per_second"] == {"ours": tokens / 2, "plain": tokens / 7}
    assert found["share"] == pytest.approx(found["flops"] / 2 / (2 * 4096 ** 3)) and found["flops"] > 0
    assert distiller.placeholders.grad is None


def test_the_typical_step_is_of_middle_size(parts):
    *_, tasks, formatter = parts
    rows_of = data.step_rows(lambda first, n: [data.sample_row(tasks, formatter, 100, i, 4, 1)
                                                for i in range(first, first + n)], 100, 2)
    sizes = sorted(sum(len(r["demo"]) for r in rows_of(step)) for step in range(64))
    assert sum(len(r["demo"]) for r in speed.typical_rows(tasks, formatter, 100, 4, 2, 1)) == sizes[32]


def test_padding_by_hand(monkeypatch):
    """Two lengths alternate: as drawn half of the short rows is padding, by length none is."""
    def row(i):
        return {"demo": [0] * (10 if i % 2 else 20), "queries": [([0], [[0]])]}
    monkeypatch.setattr(speed, "sample_row", lambda tasks, formatter, seed, i, k, queries: row(i))
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


def test_scoring_speed_compares_equal_scores(parts, monkeypatch):
    args, llm, distiller, tasks, formatter = parts
    monkeypatch.setattr(speed, "interleaved", lambda *_, **__: {"plain": [2.0, 2.0], "cached": [4.0, 4.0]})
    found = speed.scoring_speed(llm, distiller, tasks, formatter, args, n=20, n_plain=2, options=3)
    for method in ("icl", "mend"):
        assert found[method]["score_difference"] < 1e-4
        assert found[method]["seconds"] == {"plain": 20.0, "cached": 4.0} and found[method]["ratio"] == 5.0
    real = score.score_options
    monkeypatch.setattr(speed, "score_options", lambda *a: real(*a) + torch.tensor([0.0, 0.1, 0.0]))
    found = speed.scoring_speed(llm, distiller, tasks, formatter, args, n=20, n_plain=2, options=3)
    assert found["icl"]["score_difference"] > 0.09


def test_scoring_needs_a_task_that_fits(tiny_tasks):
    assert speed.scoring_task(tiny_tasks, 100, 24, 3)[0] == tiny_tasks.test[0]
    for n, options in ((25, 3), (24, 4)):
        with pytest.raises(UserError, match=f"has {n} test queries of {options} options"):
            speed.scoring_task(tiny_tasks, 100, n, options)
