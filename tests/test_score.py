"""Tests of score.py: losses by hand and by torch.distributions, scores and metrics by plain.py and
scikit-learn."""

import dataclasses
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    CPU,
    LogitsAreStates,
    close,
    demos,
    example,
    ids_maker,
    load,
    log_softmaxes,
    make_distiller,
    plain_scores,
    scoring_rows,
)
from sklearn.metrics import accuracy_score, f1_score
from torch.distributions import Categorical, kl_divergence

import paper.demos
import paper.held_out
import plain
import score
from common import UserError
from data import Formatter, collate
from loading import build_distiller, load_llm
from model import Prefix, demo_prefix, query_states
from paper.controls import majority
from paper.held_out import free_bytes, full_precision
from score import (
    distill_loss,
    finetune_loss,
    macro_f1,
    one_prefix,
    pred_loss,
    predict,
    pretrain_loss,
    score_options,
    sum_in_chunks,
    task_metrics,
)
from sources.text import Tokenizer

# Losses on their own

BOS, METHODS = 7, ["zero_shot", "icl", "icl_budget", "last_l", "mend"]


def log_p(*rows) -> torch.Tensor:
    return torch.tensor(rows).log()


def test_distill_loss_is_forward_kl_worked_by_hand():
    teacher, student = log_p([0.5, 0.5]), log_p([0.25, 0.75])
    forward = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)      # 0.1438; at temperature 2: 0.0373
    reverse = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)    # 0.1308
    assert abs(forward - reverse) > 0.01
    close(distill_loss(LogitsAreStates(), student, teacher), forward, 1e-6)
    close(distill_loss(LogitsAreStates(), teacher, student), reverse, 1e-6)
    two = distill_loss(LogitsAreStates(), torch.cat([student, teacher]), torch.cat([teacher, teacher]))
    close(two, forward / 2, 1e-6)  # a mean per token: the second one has no divergence


def test_distill_loss_equals_torch_distributions(llm):
    torch.manual_seed(0)
    student, teacher = 2 * torch.randn(300, 32), 2 * torch.randn(300, 32)  # more than two chunks
    student.requires_grad_()
    teacher.requires_grad_()
    loss = 3 * distill_loss(llm, student, teacher)
    loss.backward()
    found, student.grad = student.grad, None
    expected = 3 * kl_divergence(*(Categorical(logits=llm.lm_head(s))
                                   for s in (teacher.detach(), student))).mean()
    expected.backward()
    close(loss, expected)
    close(found, student.grad, 1e-6)
    assert found.abs().max() > 1e-4
    assert teacher.grad is None


def test_losses_never_hold_logits_for_more_than_128_positions():
    llm, seen = LogitsAreStates(), []
    llm.head.register_forward_hook(lambda head, args, logits: seen.append(len(logits)))
    torch.manual_seed(0)
    states, targets = torch.randn(300, 3, requires_grad=True), torch.randint(3, (300,))
    pred_loss(llm, states, targets).backward()
    distill_loss(llm, states, torch.randn(300, 3)).backward()
    assert max(seen) <= 128 and sum(seen) == 3 * 300  # student twice, teacher once, none made again


def test_distill_loss_is_the_same_under_autocast(llm):
    torch.manual_seed(0)
    student, teacher = 2 * torch.randn(9, 32), 2 * torch.randn(9, 32)
    expected = distill_loss(llm, student, teacher), pred_loss(llm, student, torch.arange(9))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(distill_loss(llm, student, teacher), expected[0])
        assert torch.equal(pred_loss(llm, student, torch.arange(9)), expected[1])


def test_distill_loss_rejects_different_positions():
    with pytest.raises(ValueError, match=r"\(3, 2\).*\(4, 2\)"):
        distill_loss(LogitsAreStates(), torch.zeros(3, 2), torch.zeros(4, 2))


def test_pred_loss_equals_cross_entropy(llm):
    torch.manual_seed(0)
    states, targets = torch.randn(300, 32, requires_grad=True), torch.randint(300, (300,))
    loss = pred_loss(llm, states, targets)
    loss.backward()
    found, states.grad = states.grad, None
    expected = F.cross_entropy(llm.lm_head(states), targets)
    expected.backward()
    close(loss, expected)
    close(found, states.grad, 1e-6)
    assert found.abs().max() > 1e-4


def test_losses_over_parts_with_one_denominator_add_up_to_the_mean(llm):
    torch.manual_seed(0)
    student, teacher, targets = torch.randn(10, 32), torch.randn(10, 32), torch.randint(300, (10,))
    for loss, other in ((distill_loss, teacher), (pred_loss, targets)):
        parts = [loss(llm, student[s], other[s], 10) for s in (slice(0, 3), slice(3, 10))]
        close(sum(parts), loss(llm, student, other), 1e-6)
        close(loss(llm, student, other, 40), loss(llm, student, other) / 4, 1e-6)


@pytest.mark.parametrize("chunk", [1, 3, 5, 10, 128])
def test_sum_in_chunks_equals_one_sum_in_value_and_gradient(chunk):
    torch.manual_seed(0)
    states, other = torch.randn(10, 4, requires_grad=True), torch.randn(10, 4)
    seen = []

    def loss(s, o):
        seen.append(len(s))
        return (s.tanh() * o).pow(2).sum()

    total = 2 * sum_in_chunks(loss, states, other, chunk=chunk)
    total.backward()
    found, states.grad = states.grad, None
    assert max(seen) == min(chunk, 10) and sum(seen) == 10  # never more at once, and each row once
    expected = 2 * loss(states, other)
    expected.backward()
    close(total, expected, 1e-6)
    close(found, states.grad, 1e-6)
    with torch.no_grad():
        without = sum_in_chunks(loss, states, other, chunk=chunk)
    close(2 * without, expected, 1e-6)
    assert not without.requires_grad


def test_finetune_and_pretrain_loss_weigh_their_terms():
    pred, distill = torch.tensor(3.0, requires_grad=True), torch.tensor(5.0, requires_grad=True)
    assert finetune_loss(pred, distill, 0.1).item() == pytest.approx(3.5)
    assert finetune_loss(pred, distill, 0.5, 0.0).item() == 2.5
    assert finetune_loss(pred, distill, 0.0).item() == 3.0
    loss = pretrain_loss(pred, distill, 0.1)  # L_CLM + gamma L_distill, App. B
    loss.backward()
    assert (loss.item(), pred.grad.item(), distill.grad.item()) == pytest.approx((3.5, 1.0, 0.1))
    assert pretrain_loss(0, distill, 1.0).item() == 5.0 and pretrain_loss(pred, 0, 1.0).item() == 3.0


def test_score_options_of_more_than_one_chunk_of_answer_tokens(llm):
    ids = ids_maker(3)
    rows = [{"demo": ids(5), "queries": [(ids(3), [ids(50), ids(50), ids(60)])]}]
    batch = collate(rows)
    scores = score_options(llm, demo_prefix(llm, *demos(batch)), batch)
    close(scores[0], plain_scores(llm, rows, [plain.embed(llm, rows[0]["demo"])])[0])


@pytest.mark.parametrize("head", [[], [BOS], [BOS, 9, 4]])
def test_score_options_without_demonstrations_equal_plain_scores(llm, head):
    """Zero-shot: without a BOS, the first token of x has no predictor; every answer token has one."""
    rows = [{"demo": [], "queries": scoring_rows()[1]["queries"]}]
    batch = collate(rows)
    prefix = demo_prefix(llm, *demos(batch), head)
    if not head:
        assert prefix == Prefix([], None, prefix.mask) and prefix.mask.shape == (1, 0)
        assert not query_states(llm, prefix, batch)[0, 0].any()
    bos = plain.embed(llm, head)
    close(score_options(llm, prefix, batch)[0], plain_scores(llm, rows, [bos])[0])


def test_an_llm_that_a_gpu_does_not_hold_in_full_precision_stays(llm_folder, monkeypatch, capsys):
    """By 0.9 of what the GPU has free and torch has reserved and not used, as it stands at first."""
    place = torch.device("cpu")
    more = 2 * sum(t.numel() for t in load_llm(str(llm_folder), place, torch.bfloat16).parameters())
    monkeypatch.setattr("paper.held_out.free_bytes", lambda _: free_bytes(torch.device("cuda")))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000)
    for needed, dtype in ((0.9 * more, torch.bfloat16), (1.2 * more, torch.float32)):
        llm = load_llm(str(llm_folder), place, torch.bfloat16)
        for free in (needed - 4000, 2 * more - needed):  # the second time it is settled
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 0))
            with full_precision(llm):
                assert llm.dtype == dtype
        assert llm.dtype == torch.bfloat16
    assert capsys.readouterr().out.count("note: evaluated in torch.bfloat16") == 1


def test_ranks_evaluate_in_one_precision(llm_folder, monkeypatch):
    llm = load_llm(str(llm_folder), torch.device("cpu"), torch.bfloat16)
    monkeypatch.setattr("paper.held_out.gather", lambda own: [*own, False])  # another rank's GPU is smaller
    with full_precision(llm):
        assert llm.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_full_precision_gives_every_tensor_back_as_it_was(llm_folder, dtype):
    llm = load_llm(str(llm_folder), torch.device("cpu"), dtype)
    before = {name: t.clone() for name, t in [*llm.named_parameters(), *llm.named_buffers()]}
    tied = llm.get_input_embeddings().weight is llm.get_output_embeddings().weight
    with pytest.raises(KeyboardInterrupt), full_precision(llm):
        assert llm.dtype == torch.float32
        inside = {name: t.clone() for name, t in [*llm.named_parameters(), *llm.named_buffers()]}
        raise KeyboardInterrupt
    after = dict([*llm.named_parameters(), *llm.named_buffers()])
    assert before.keys() == inside.keys() == after.keys() and llm.dtype == dtype and len(before) > 20
    for name, t in before.items():  # also what is fp32 in any case, such as rotary frequencies
        assert after[name].dtype == t.dtype and torch.equal(after[name], t)
        expected = t.float() if t.is_floating_point() else t
        assert inside[name].dtype == expected.dtype and torch.equal(inside[name], expected)
    assert (llm.get_input_embeddings().weight is llm.get_output_embeddings().weight) == tied


@pytest.mark.parametrize("seed", range(25))
def test_metrics_against_scikit_learn(seed):
    rng = random.Random(seed)
    labels = ["b", "a", "C", "d"][:rng.randint(1, 4)]
    n = rng.randint(1, 40)
    golds = rng.choices(labels, k=n)
    predictions = rng.choices([*labels, "never gold"], k=n)
    f1 = f1_score(golds, predictions, labels=sorted(set(golds)), average="macro", zero_division=0)
    acc = accuracy_score(golds, predictions)
    assert macro_f1(predictions, golds) == pytest.approx(f1)
    assert score.accuracy(predictions, golds) == pytest.approx(acc)
    for task_type, headline in (("classification", f1), ("multi-choice", acc), ("QA", acc)):
        assert task_metrics(predictions, golds, task_type) == pytest.approx(
            {"macro_f1": f1, "accuracy": acc, "headline": headline})


def shots(*labels: str, options="abc") -> list[dict]:
    return [example(f"x{i}", label, options) for i, label in enumerate(labels)]


def test_majority_by_hand():
    queries = shots("a", "a")
    assert majority(shots("b", "a", "b"), queries) == ["b", "b"]
    assert majority(shots("c", "a", "a", "c"), queries) == ["c", "c"]  # equally frequent: the one seen first
    # multiple choice: the labels are no option of the query; position 1 was right twice, position 0 once
    demos = [*shots("q", options="pq"), *shots("s", options="rs"), *shots("t", options="tu")]
    three = shots("a", options="abc")
    assert majority(demos, three) == ["b"] and majority(demos[2:], three) == ["a"]
    far = shots("z", options="wxyz")  # position 3 of a query with two options: its last
    assert majority(far, shots("a", options="ab")) == ["b"]
    # the most frequent label, where the query has it
    assert majority(demos, shots("a", options="qa")) == ["q"]


@pytest.fixture
def files(tiny_tasks):
    return tiny_tasks.files("ag_news", 13)


def sizes_of_passes(monkeypatch, size) -> list[int]:
    """`size` of the query mask of every forward pass that is scored from now on."""
    sizes, scoring = [], score.score_options
    for reader in (score, paper.demos):
        monkeypatch.setattr(reader, "score_options", lambda llm, prefix, batch: (
            sizes.append(int(size(batch["query_mask"]))), scoring(llm, prefix, batch))[1])
    return sizes


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pass_tokens", [1, 60, 100_000])
def test_packed_queries_are_answered_like_single_ones(setting, files, monkeypatch, method, pass_tokens):
    queries = [q | {"options": q["options"][:2 + i % 2]} for i, q in enumerate(files["test"])]
    prefix = one_prefix(method, files["train"], 400, setting.llm, setting.distiller, setting.formatter,
                        setting.args)
    one_by_one = [predict(setting.llm, prefix, setting.formatter, [q], prefix.state is None)[0]
                  for q in queries]
    sizes = sizes_of_passes(monkeypatch, torch.sum)
    monkeypatch.setattr(score, "PASS_TOKENS", {"cpu": pass_tokens, "cuda": pass_tokens})
    assert predict(setting.llm, prefix, setting.formatter, queries, prefix.state is None) == one_by_one
    assert len(set(one_by_one)) > 1  # else an LLM that always says the same would pass
    assert {1: len(sizes) == 24, 60: max(sizes) <= 60 and 1 < len(sizes) < 24,
            100_000: len(sizes) == 1}[pass_tokens]
    encoded = [setting.formatter.scoring_query(q, first=prefix.state is None) for q in queries]
    assert sum(sizes) == sum(len(x) + sum(map(len, options)) for x, options in encoded)


@pytest.mark.parametrize("method", ["icl", "icl_budget", "last_l", "mend"])
@pytest.mark.parametrize("set_tokens", [1, 700, 100_000])
def test_a_set_for_each_query_is_read_like_that_set_alone(setting, files, monkeypatch, method, set_tokens):
    rng = random.Random(4)
    queries = [q | {"options": q["options"][:2 + i % 2]} for i, q in enumerate(files["test"])]
    sets = [rng.sample(files["train"], rng.randint(1, 12)) for _ in queries]
    llm, formatter, alone = setting.llm, setting.formatter, []
    for shown, query in zip(sets, queries, strict=True):
        prefix = one_prefix(method, shown, 200, llm, setting.distiller, formatter, setting.args)
        alone += predict(llm, prefix, formatter, [query])
    sizes = sizes_of_passes(monkeypatch, len)
    monkeypatch.setattr(paper.demos, "SET_TOKENS", set_tokens)
    found = paper.demos.predict_each(method, sets, 200, llm, setting.distiller, formatter, queries,
                                     setting.args)
    assert found == alone
    assert len(set(alone)) > 1 and sum(sizes) == 24
    assert {1: len(sizes) == 24, 700: 24 > len(sizes) > 1, 100_000: len(sizes) == 1}[set_tokens]


def test_what_each_method_puts_before_the_query(setting, files):
    demos, formatter = files["train"], setting.formatter
    prefix = {m: one_prefix(m, demos, 200, setting.llm, setting.distiller, formatter, setting.args)
              for m in METHODS}
    whole = formatter.demonstrations(demos, 200)
    for method, ids in (("zero_shot", []), ("icl", whole), ("icl_budget", formatter.budget(demos, 24)),
                        ("last_l", whole[-24:])):
        expected = demo_prefix(setting.llm, torch.tensor([ids], dtype=torch.long),
                               torch.ones(1, len(ids), dtype=torch.bool))
        assert prefix[method].mask.shape == (1, len(ids)) and (prefix[method].state is None) == (not ids)
        for (k, v), (k2, v2) in zip(prefix[method].keys_values, expected.keys_values, strict=True):
            assert torch.equal(k, k2) and torch.equal(v, v2)
    assert prefix["mend"].mask.shape == (1, 4)
    assert prefix["last_l"].mask.shape == (1, 24)
    assert 24 >= prefix["icl_budget"].mask.shape[1] < prefix["icl"].mask.shape[1] <= 200


DEV = SimpleNamespace(seed=13, k=3, distill_len=4, dtype="fp32", eval_queries=None, eval_tasks=None)


def test_dev_figures_against_one_query_at_a_time(setting, tiny_tasks):
    llm, formatter, distiller = setting.llm, setting.formatter, make_distiller(setting.llm).train()
    whole = paper.held_out.dev_metrics(llm, distiller, tiny_tasks, formatter, DEV, CPU)
    assert distiller.training  # left as the training loop needs it
    distiller.eval()
    kl, clm, pred, headlines, option_ce = [], [], [], [], []
    with torch.no_grad():
        for task in tiny_tasks.test:
            files = tiny_tasks.files(task, 13)
            demo = torch.tensor([formatter.demonstrations(files["train"][:3], 900)])
            embedded = llm.get_input_embeddings()(demo)
            vectors = distiller(demo, torch.ones_like(demo, dtype=torch.bool))
            chosen, ce = [], []
            for query in files["dev"]:
                x, (y,) = formatter.training_query(query)
                student, teacher = (log_softmaxes(llm, context, x + y) for context in (vectors, embedded))
                kl += (teacher.exp() * (teacher - student)).sum(dim=1).tolist()
                clm += [-student[i, token].item() for i, token in enumerate(x + y)]
                pred += [-student[len(x) + i, token].item() for i, token in enumerate(y)]
                options = [formatter.answer(option) for option in query["options"]]
                scores = [log_softmaxes(llm, vectors, x + o)[range(len(x), len(x + o)), o].mean().item()
                          for o in options]
                chosen.append(query["options"][int(np.argmax(scores))])
                shares = np.exp(scores) / np.exp(scores).sum()
                ce.append(-np.log(shares[query["options"].index(query["output"])]))
            option_ce.append(np.mean(ce))
            golds = [q["output"] for q in files["dev"]]
            headlines.append(f1_score(golds, chosen, labels=sorted(set(golds)), average="macro",
                                      zero_division=0))
    assert whole == pytest.approx({"dev_pred": np.mean(pred), "dev_kl": np.mean(kl), "dev_clm": np.mean(clm),
                                   "dev_headline": np.mean(headlines),
                                   "dev_option_ce": np.mean(option_ce)}, rel=1e-4)


def test_dev_figures_of_some_tasks(setting, tiny_tasks, monkeypatch):
    seen, files = [], type(tiny_tasks).files
    monkeypatch.setattr(type(tiny_tasks), "files", lambda self, task, seed: (seen.append(task),
                                                                             files(self, task, seed))[1])
    monkeypatch.setattr(tiny_tasks, "test", (tiny_tasks.test * 3)[:5])
    for n, expected in ((1, [0]), (2, [0, 2]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3, 4])):
        seen.clear()
        args = SimpleNamespace(**{**vars(DEV), "eval_tasks": n})
        paper.held_out.dev_metrics(setting.llm, setting.distiller, tiny_tasks, setting.formatter, args, CPU)
        assert seen == [tiny_tasks.test[i] for i in expected]


def test_dev_figures_are_taken_without_dropout(gpt2, tiny_tasks):
    llm = load(gpt2)
    distiller = build_distiller("layers:2", llm, 4, "matched", 0).train()
    assert distiller.backbone.config.resid_pdrop > 0
    formatter = Formatter(Tokenizer(str(gpt2)), "space", 300, 4, 640, 640)
    first, second = (paper.held_out.dev_metrics(llm, distiller, tiny_tasks, formatter, DEV, CPU)
                     for _ in range(2))
    assert first == second and distiller.training


def test_a_query_that_passes_the_positions_is_refused(setting, files):
    """Its options may be longer than those of the demonstrations, by which a prefix was made."""
    formatter = dataclasses.replace(setting.formatter, llm_positions=60)
    prefix = one_prefix("icl", files["train"][:2], 40, setting.llm, None, formatter, setting.args)
    predict(setting.llm, prefix, formatter, files["test"][:1])
    long = [files["test"][0] | {"options": ["happy", "happy and sad " * 9]}]
    with pytest.raises(UserError, match=r"take \d+ positions, and the LLM has 60; give a smaller"):
        predict(setting.llm, prefix, formatter, long)
