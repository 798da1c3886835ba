"""Tests of model.py against torch.distributions, hand-worked numbers, and the plain reference in plain.py."""

import copy
import json
import math
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import plain_losses as losses_of_prefixes
from conftest import plain_scores
from torch import nn
from torch.distributions import Categorical, kl_divergence
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    T5Config,
)

import plain
from common import UserError
from data import collate
from loading import (
    build_distiller,
    distiller_config,
    embedding_rms,
    first_layers,
    fuse_gelu,
    load_distiller,
    load_llm,
    max_positions,
)
from model import (
    Distiller,
    Prefix,
    attention_mask,
    demo_prefix,
    head_logits,
    query_states,
    vector_prefix,
    with_bos,
)
from run import make_optimizer, save_checkpoint
from score import (
    distill_loss,
    finetune_loss,
    full_precision,
    pred_loss,
    pretrain_loss,
    score_options,
    sum_in_chunks,
)

CPU, BOS = torch.device("cpu"), 7


def load(folder):
    return load_llm(str(folder), CPU, torch.float32)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small wait for threads more than they compute: ten times slower where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def llm(llm_folder):
    return load(llm_folder)


def test_the_fused_gelu_is_gpt2s(gpt2):
    """Same logits and gradient as transformers' own, with fewer tensors kept for the backward pass."""
    found = {}
    for name in ("own", "fused"):
        llm = AutoModelForCausalLM.from_pretrained(gpt2).eval()
        if name == "fused":
            assert fuse_gelu(llm) is llm and not any("NewGELU" in type(m).__name__ for m in llm.modules())
        embeds, kept = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0)).requires_grad_(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: (kept.append(t), t)[1], lambda t: t):
            logits = llm(inputs_embeds=embeds).logits
        logits.square().sum().backward()
        found[name] = logits.detach(), embeds.grad, len(kept)
    for own, fused in zip(found["own"][:2], found["fused"][:2], strict=True):
        torch.testing.assert_close(fused, own, atol=1e-4, rtol=1e-4)
    assert found["fused"][2] < found["own"][2]


def test_gpt2_is_loaded_with_the_fused_gelu(gpt2):
    llm = load(gpt2)
    for model in (llm, build_distiller("layers:2", llm, 4, "plain", 0), build_distiller(str(gpt2), llm, 4, "plain", 0)):
        assert [m for m in model.modules() if "NewGELU" in type(m).__name__] == []
        assert any(isinstance(m, nn.GELU) for m in model.modules())


def make_distiller(llm, spec: str = "layers:2", distill_len: int = 4, start: str = "matched", seed: int = 0):
    """A distiller without dropout, so that two runs can be compared."""
    return build_distiller(spec, llm, distill_len, start, seed).eval()


def close(found, expected, tolerance: float = 1e-4):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), atol=tolerance, rtol=tolerance)


def ids_maker(seed: int = 0):
    rng = random.Random(seed)
    return lambda n: [rng.randrange(1, 300) for _ in range(n)]


def training_rows() -> list[dict]:
    """Ragged rows with several queries of one answer each: padding on the left and on the right, and packing."""
    ids = ids_maker(1)
    return [{"demo": ids(9), "queries": [(ids(5), [ids(2)]), (ids(3), [ids(4)]), (ids(6), [ids(1)])]},
            {"demo": ids(17), "queries": [(ids(2), [ids(3)])]},
            {"demo": ids(4), "queries": [(ids(7), [ids(2)]), (ids(1), [ids(2)])]}]


def scoring_rows() -> list[dict]:
    """Ragged rows with different numbers of queries, and of options of different lengths."""
    ids = ids_maker(2)
    return [{"demo": ids(6), "queries": [(ids(5), [ids(1), ids(3), ids(2)]), (ids(2), [ids(2), ids(2)])]},
            {"demo": ids(13), "queries": [(ids(3), [ids(2), ids(1), ids(4), ids(1)])]},
            {"demo": ids(8), "queries": [(ids(1), [ids(2)]), (ids(4), [ids(1), ids(1)]), (ids(6), [ids(5), ids(2)])]}]


def losses(llm, distiller, rows, bos_id=None):
    """(pred, distill) of rows, the way a training step does it."""
    batch = collate(rows)
    with torch.no_grad():
        teacher = query_states(llm, demo_prefix(llm, batch["demo_ids"], batch["demo_mask"], bos_id), batch)
    vectors = distiller(batch["demo_ids"], batch["demo_mask"])
    student = query_states(llm, vector_prefix(llm, vectors, bos_id), batch)
    mask, answers = batch["query_mask"], batch["query_mask"] & (batch["branch"] > 0)
    return (pred_loss(llm, student[answers], batch["query_ids"][answers]),
            distill_loss(llm, student[mask], teacher[mask]))


def plain_losses(llm, distiller, rows, bos_id=None):
    bos = plain.embed(llm, [] if bos_id is None else [bos_id])
    students = [torch.cat([bos, plain.Distiller.forward(distiller, row["demo"])]) for row in rows]
    teachers = [torch.cat([bos, plain.embed(llm, row["demo"])]) for row in rows]
    return losses_of_prefixes(llm, rows, students, teachers)


def gradients(distiller) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in distiller.named_parameters()}
    distiller.zero_grad()
    return found


def assert_same_gradients(found, expected):
    """Every tensor within 1e-5 of its own size, and none of them zero."""
    assert found.keys() == expected.keys()
    for name, e in expected.items():
        assert e.abs().max() > 1e-7, f"the gradient of {name} is zero: the comparison would say nothing"
        assert (found[name] - e).norm() <= 1e-5 * e.norm() + 1e-8, name


# ---------------------------------------------------------------------------------------------------------------------
# Losses on their own


class LogitsAreStates(nn.Module):
    """An LLM whose head is the identity: a state is its logits."""

    dtype = torch.float32

    def __init__(self, **config):
        super().__init__()
        self.config, self.head = SimpleNamespace(**config), nn.Identity()

    def get_output_embeddings(self):
        return self.head


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
    expected = 3 * kl_divergence(*(Categorical(logits=llm.lm_head(s)) for s in (teacher.detach(), student))).mean()
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


def test_pred_loss_worked_by_hand():
    states, targets = log_p([0.5, 0.25, 0.25], [0.1, 0.2, 0.7]), torch.tensor([1, 2])
    close(pred_loss(LogitsAreStates(), states, targets), -(math.log(0.25) + math.log(0.7)) / 2, 1e-6)


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


def test_finetune_loss_is_pred_plus_lambda_distill():
    assert finetune_loss(torch.tensor(2.0), torch.tensor(3.0), 0.1).item() == pytest.approx(2.3)
    assert finetune_loss(torch.tensor(2.0), torch.tensor(3.0), 0.0).item() == 2.0


def test_finetune_and_pretrain_loss_weigh_their_terms():
    pred, distill = torch.tensor(3.0, requires_grad=True), torch.tensor(5.0, requires_grad=True)
    assert finetune_loss(pred, distill, 0.5, 0.0).item() == 2.5 and finetune_loss(pred, distill, 0.0).item() == 3.0
    loss = pretrain_loss(pred, distill, 0.1)  # L_CLM + gamma L_distill, App. B
    loss.backward()
    assert (loss.item(), pred.grad.item(), distill.grad.item()) == pytest.approx((3.5, 1.0, 0.1))
    assert pretrain_loss(0, distill, 1.0).item() == 5.0 and pretrain_loss(pred, 0, 1.0).item() == 3.0


def test_head_logits_equal_the_models_own(llm):
    ids = torch.tensor([ids_maker()(8)])
    torch.manual_seed(0)
    gemma = Gemma2ForCausalLM(Gemma2Config(
        vocab_size=320, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, initializer_range=1.0, final_logit_softcapping=2.0)).eval()
    for model in (llm, gemma):
        with torch.no_grad():
            out = model(ids, output_hidden_states=True)
            close(head_logits(model, out.hidden_states[-1][0]), out.logits[0])
    assert 1.9 < out.logits.abs().max() <= 2  # the cap was felt
    close(head_logits(LogitsAreStates(final_logit_softcapping=2.0), torch.tensor([[3.0, -1.0]])),
          [[2 * math.tanh(1.5), 2 * math.tanh(-0.5)]], 1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# The packed, cached, padded way against the plain one


def sequences(rows):
    """(row, segment, option number or 0, x, option) for every way through every query."""
    for b, row in enumerate(rows):
        for s, (x, options) in enumerate(row["queries"]):
            for o, option in enumerate(options, 1):
                yield b, s, o, x, option


def where(batch, b, s, o):
    """Columns of query s's own tokens (o = 0) or of its option o, in row b."""
    return batch["query_mask"][b] & (batch["segment"][b] == s) & (batch["branch"][b] == o)


@pytest.mark.parametrize("kind", ["demonstrations", "vectors"])
@pytest.mark.parametrize("bos_id", [None, BOS])
def test_query_states_equal_plain_states_and_logits(llm, kind, bos_id):
    rows = scoring_rows()
    batch, distiller = collate(rows), make_distiller(llm)
    bos = plain.embed(llm, [] if bos_id is None else [bos_id])
    with torch.no_grad():
        if kind == "vectors":
            prefix = vector_prefix(llm, distiller(batch["demo_ids"], batch["demo_mask"]), bos_id)
            plain_prefixes = [torch.cat([bos, plain.Distiller.forward(distiller, row["demo"])]) for row in rows]
        else:
            prefix = demo_prefix(llm, batch["demo_ids"], batch["demo_mask"], bos_id)
            plain_prefixes = [torch.cat([bos, plain.embed(llm, row["demo"])]) for row in rows]
        states = query_states(llm, prefix, batch)
        checked = torch.zeros_like(batch["query_mask"])
        for b, s, o, x, option in sequences(rows):
            at_x, at_option = where(batch, b, s, 0), where(batch, b, s, o)
            assert batch["query_ids"][b][at_x].tolist() + batch["query_ids"][b][at_option].tolist() == x + option
            found = torch.cat([states[b][at_x], states[b][at_option]])
            plain_prefix = plain_prefixes[b]
            embeds = torch.cat([plain_prefix, plain.embed(llm, x + option)])
            expected = llm(inputs_embeds=embeds[None], output_hidden_states=True).hidden_states[-1][0]
            close(found, expected[len(plain_prefix) - 1:-1])
            close(head_logits(llm, found), plain.read(llm, plain_prefix, x, option))
            checked[b] |= at_x | at_option
    assert torch.equal(checked, batch["query_mask"])


@pytest.mark.parametrize("bos_id", [None, BOS])
def test_losses_equal_plain_losses(llm, bos_id):
    distiller = make_distiller(llm)
    with torch.no_grad():
        found, expected = losses(llm, distiller, training_rows(), bos_id), \
            plain_losses(llm, distiller, training_rows(), bos_id)
    close(found[0], expected[0])
    close(found[1], expected[1])
    assert expected[1] > 0.01


def test_distill_loss_of_queries_without_answers_equals_plain(llm):
    """Pretraining: all of x counts, from its first token on, and there is no y."""
    rows = [{"demo": row["demo"], "queries": [(x, []) for x, _ in row["queries"][:1]]} for row in training_rows()]
    distiller, batch = make_distiller(llm), collate(rows)
    with torch.no_grad():
        teacher = query_states(llm, demo_prefix(llm, batch["demo_ids"], batch["demo_mask"]), batch)
        student = query_states(llm, vector_prefix(llm, distiller(batch["demo_ids"], batch["demo_mask"])), batch)
        mask = batch["query_mask"]
        _, expected = plain_losses(llm, distiller, rows)
        close(distill_loss(llm, student[mask], teacher[mask]), expected)


def test_score_options_equal_plain_scores_with_minus_infinity_for_missing_ones(llm):
    rows = scoring_rows()
    batch = collate(rows)
    scores = score_options(llm, demo_prefix(llm, batch["demo_ids"], batch["demo_mask"]), batch)
    assert scores.shape == (3, 3, 4)
    expected = torch.full((3, 3, 4), float("-inf"))
    for b, row in enumerate(plain_scores(llm, rows, [plain.embed(llm, row["demo"]) for row in rows])):
        for s, options in enumerate(row):
            expected[b, s, :len(options)] = torch.tensor(options)
    assert expected.isfinite().sum() == 14
    assert torch.equal(scores.isfinite(), expected.isfinite())
    close(scores, expected)


def test_score_options_of_more_than_one_chunk_of_answer_tokens(llm):
    ids = ids_maker(3)
    rows = [{"demo": ids(5), "queries": [(ids(3), [ids(50), ids(50), ids(60)])]}]
    batch = collate(rows)
    scores = score_options(llm, demo_prefix(llm, batch["demo_ids"], batch["demo_mask"]), batch)
    close(scores[0], plain_scores(llm, rows, [plain.embed(llm, rows[0]["demo"])])[0])


def test_score_options_of_vectors_equal_plain_scores(llm):
    rows, distiller = scoring_rows()[1:2], make_distiller(llm)
    batch = collate(rows)
    with torch.no_grad():
        vectors = distiller(batch["demo_ids"], batch["demo_mask"])
        expected = plain_scores(llm, rows, [plain.Distiller.forward(distiller, rows[0]["demo"])])
    close(score_options(llm, vector_prefix(llm, vectors), batch)[0], expected[0])


def test_score_options_without_any_prefix_equal_plain_scores(llm):
    """Zero-shot: the first token of x has no predictor, and every answer token has one."""
    (x, options), = scoring_rows()[1]["queries"]
    batch = collate([{"demo": [], "queries": [(x, options)]}])
    prefix = demo_prefix(llm, batch["demo_ids"], batch["demo_mask"])
    assert prefix == Prefix([], None, prefix.mask) and prefix.mask.shape == (1, 0)
    assert not query_states(llm, prefix, batch)[0, 0].any()
    rows = [{"queries": [(x, options)]}]
    close(score_options(llm, prefix, batch)[0], plain_scores(llm, rows, [plain.embed(llm, [])])[0])


def test_queries_and_options_do_not_see_each_other(llm):
    rows, ids = scoring_rows(), ids_maker(9)

    def scores(rows):
        batch = collate(rows)
        return score_options(llm, demo_prefix(llm, batch["demo_ids"], batch["demo_mask"]), batch)

    def changed(b, s, o):
        """Rows with other tokens, as many, in option o of query s of row b; o = 0: in its x."""
        new = copy.deepcopy(rows)
        x, options = new[b]["queries"][s]
        if o:
            options[o - 1] = ids(len(options[o - 1]))
        else:
            new[b]["queries"][s] = (ids(len(x)), options)
        return new

    before = scores(rows)
    for b, s, o in ((0, 0, 1), (0, 0, 2), (0, 1, 1), (2, 2, 1), (0, 0, 0), (2, 1, 0)):
        moved = (scores(changed(b, s, o)) - before).nan_to_num().abs() > 1e-5  # inf - inf is nan: missing options
        expected = torch.zeros_like(moved)
        expected[b, s, (o - 1) if o else slice(len(rows[b]["queries"][s][1]))] = True
        assert torch.equal(moved, expected), f"changing row {b}, query {s}, option {o} moved {moved.nonzero().tolist()}"


def test_attention_mask_worked_by_hand():
    """One pad, one prefix token; x of two tokens, options of one and of two, another query of one, one pad."""
    mask = attention_mask(torch.tensor([[False, True]]), torch.tensor([[0, 0, 0, 0, 0, 1, 0]]),
                          torch.tensor([[0, 0, 1, 2, 2, 0, 0]]), torch.tensor([[True] * 6 + [False]]))
    assert mask.shape == (1, 1, 7, 9)
    expected = ["01 1000000", "01 1100000", "01 1110000", "01 1101000", "01 1101100", "01 0000010"]
    found = ["".join(str(int(v)) for v in row[:2]) + " " + "".join(str(int(v)) for v in row[2:]) for row in mask[0, 0]]
    assert found[:6] == expected
    assert found[6][-1] == "1"  # a pad's own row is of no interest, but must not be empty


def test_padding_changes_no_value(llm):
    rows, distiller = training_rows(), make_distiller(llm)

    def run(rows):
        batch = collate(rows)
        vectors = distiller(batch["demo_ids"], batch["demo_mask"])
        prefix = demo_prefix(llm, batch["demo_ids"], batch["demo_mask"])
        return vectors, query_states(llm, vector_prefix(llm, vectors), batch), query_states(llm, prefix, batch), batch

    with torch.no_grad():
        together = run(rows)
        for b, row in enumerate(rows):
            alone = run([row])
            n = alone[3]["query_mask"].sum()
            close(together[0][b], alone[0][0])
            close(together[1][b, :n], alone[1][0])
            close(together[2][b, :n], alone[2][0])


def test_padding_changes_no_gradient(llm):
    """Row 2 is the shortest: alone it has no padding, in the batch it has 13 pads on the left and 9 on the right."""
    rows, distiller = training_rows(), make_distiller(llm)
    n_answers = [sum(len(y) for _, (y,) in row["queries"]) for row in rows]
    batch = collate(rows)
    student = query_states(llm, vector_prefix(llm, distiller(batch["demo_ids"], batch["demo_mask"])), batch)
    answers = batch["query_mask"] & (batch["branch"] > 0)
    answers[:2] = False
    assert answers.sum() == n_answers[2]
    pred_loss(llm, student[answers], batch["query_ids"][answers]).backward()
    found = gradients(distiller)
    losses(llm, distiller, rows[2:])[0].backward()
    assert_same_gradients(found, gradients(distiller))


def test_distiller_equals_plain_vectors(llm):
    rows, distiller = training_rows(), make_distiller(llm, distill_len=5)
    batch = collate(rows)
    with torch.no_grad():
        vectors = distiller(batch["demo_ids"], batch["demo_mask"])
        assert vectors.shape == (3, 5, 32) and vectors.dtype == torch.float32
        for b, row in enumerate(rows):
            close(vectors[b], plain.Distiller.forward(distiller, row["demo"]))


def test_gradient_through_the_shared_prefix_equals_the_sum_of_separate_ones(llm):
    """Several queries read one cached prefix; the plain way distils anew for each and backpropagates separately."""
    rows, distiller, lam = training_rows(), make_distiller(llm), 0.7
    finetune_loss(*losses(llm, distiller, rows), lam).backward()
    found = gradients(distiller)
    queries = [query for row in rows for query in row["queries"]]
    n_answers = sum(len(y) for _, (y,) in queries)
    n_tokens = n_answers + sum(len(x) for x, _ in queries)
    for row in rows:
        for x, (y,) in row["queries"]:
            pred, distill = plain_losses(llm, distiller, [{"demo": row["demo"], "queries": [(x, [y])]}])
            (pred * len(y) / n_answers + lam * distill * len(x + y) / n_tokens).backward()
    assert_same_gradients(found, gradients(distiller))


def test_a_cached_prefix_can_be_used_repeatedly(llm):
    batch, other = collate(scoring_rows()), collate(training_rows())
    prefix = demo_prefix(llm, batch["demo_ids"], batch["demo_mask"])
    before = copy.deepcopy(prefix)
    first = query_states(llm, prefix, batch)
    query_states(llm, prefix, other)
    assert torch.equal(query_states(llm, prefix, batch), first)
    for (keys, values), (old_keys, old_values) in zip(prefix.keys_values, before.keys_values, strict=True):
        assert torch.equal(keys, old_keys) and torch.equal(values, old_values)
    assert torch.equal(prefix.state, before.state) and torch.equal(prefix.mask, before.mask)


def test_eager_attention_gives_the_same_as_sdpa(llm, llm_folder):
    eager = AutoModelForCausalLM.from_pretrained(llm_folder, attn_implementation="eager").eval().requires_grad_(False)
    assert llm.config._attn_implementation == "sdpa" and eager.config._attn_implementation == "eager"
    batch, distillers = collate(scoring_rows()), (make_distiller(llm), make_distiller(eager))
    assert distillers[1].backbone.config._attn_implementation == "eager"
    with torch.no_grad():
        vectors, eager_vectors = (d(batch["demo_ids"], batch["demo_mask"]) for d in distillers)
        close(eager_vectors, vectors)
        mask, demos = batch["query_mask"], (batch["demo_ids"], batch["demo_mask"])
        for prefix in (lambda m: vector_prefix(m, vectors), lambda m: demo_prefix(m, *demos)):
            close(query_states(eager, prefix(eager), batch)[mask], query_states(llm, prefix(llm), batch)[mask])


# ---------------------------------------------------------------------------------------------------------------------
# BOS


def test_bos_stands_before_the_first_real_token(llm):
    torch.manual_seed(0)
    embeds, mask = torch.randn(3, 4, 32), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]]).bool()
    out, out_mask = with_bos(llm, embeds, mask, BOS)
    bos = llm.get_input_embeddings().weight[BOS]
    assert out_mask.tolist() == [[False, False, True, True, True], [True] * 5, [False, False, False, True, True]]
    for b in range(3):
        real = embeds[b][mask[b]]
        assert torch.equal(out[b][out_mask[b]], torch.cat([bos[None], real]))
    same, same_mask = with_bos(llm, embeds, mask, None)
    assert same is embeds and same_mask is mask


def test_bos_alone_where_there_is_no_prefix(llm):
    (x, options), = scoring_rows()[1]["queries"]
    batch = collate([{"demo": [], "queries": [(x, options)]}])
    scores = score_options(llm, demo_prefix(llm, batch["demo_ids"], batch["demo_mask"], BOS), batch)
    close(scores[0], plain_scores(llm, [{"queries": [(x, options)]}], [plain.embed(llm, [BOS])])[0])


# ---------------------------------------------------------------------------------------------------------------------
# Training: who learns and who does not


@pytest.mark.parametrize("spec", ["layers:2", "sibling"])
def test_a_step_trains_all_of_the_distiller_and_nothing_of_the_llm(llm_folder, spec):
    llm = load(llm_folder)
    distiller = make_distiller(llm, str(llm_folder) if spec == "sibling" else spec)
    frozen = copy.deepcopy(llm.state_dict())
    before = copy.deepcopy(dict(distiller.named_parameters()))
    optimizer = make_optimizer(distiller, 1e-3)
    finetune_loss(*losses(llm, distiller, training_rows()), 1.0).backward()
    for name, p in distiller.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, f"{name} learns nothing"
    optimizer.step()
    assert all(p.grad is None and not p.requires_grad for p in llm.parameters())
    assert not llm.training
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in llm.state_dict().items())
    assert not any(torch.equal(p, before[name]) for name, p in distiller.named_parameters())


def test_the_shared_embedding_is_neither_trained_nor_saved(llm):
    distiller = make_distiller(llm)
    embedding = llm.get_input_embeddings()
    assert distiller.embed is embedding
    pointer, shape = embedding.weight.data_ptr(), embedding.weight.shape
    for tensor in (*distiller.parameters(), *distiller.state_dict().values()):
        assert tensor.data_ptr() != pointer and tensor.shape != shape
    assert {"placeholders", "gain"} <= distiller.state_dict().keys()


def test_a_siblings_own_embedding_is_trained_and_saved_once(llm, llm_folder):
    distiller = make_distiller(llm, str(llm_folder))
    shape = llm.get_input_embeddings().weight.shape
    assert distiller.embed is not llm.get_input_embeddings()
    assert [name for name, t in distiller.state_dict().items() if t.shape == shape] == ["embed.weight"]
    assert [name for name, p in distiller.named_parameters() if p.shape == shape] == ["embed.weight"]


# ---------------------------------------------------------------------------------------------------------------------
# The distiller


def test_placeholders_start_as_embedding_rows_of_ids_from_100_on(llm):
    rows = llm.get_input_embeddings().weight                                                          # (V, d)
    placeholders = make_distiller(llm, distill_len=200).placeholders
    hits = (placeholders[:, None] == rows[None]).all(dim=2)                                           # (l, V)
    assert torch.equal(hits.sum(dim=1), torch.ones(200, dtype=torch.long))
    ids = hits.float().argmax(dim=1)
    assert len(rows) > 200 and ids.min() >= 100
    assert ids.min() < 110 and ids.max() > len(rows) - 10 and len(ids.unique()) > 80  # over the whole range
    assert placeholders.requires_grad and placeholders.data_ptr() != rows.data_ptr()
    assert torch.equal(placeholders, make_distiller(llm, distill_len=200).placeholders)
    assert not torch.equal(placeholders, make_distiller(llm, distill_len=200, seed=1).placeholders)


def test_one_vector_works_and_none_is_an_error(llm):
    rows, distiller = training_rows(), make_distiller(llm, distill_len=1)
    batch = collate(rows)
    assert distiller.distill_len == 1
    with torch.no_grad():
        assert distiller(batch["demo_ids"], batch["demo_mask"]).shape == (3, 1, 32)
        for found, expected in zip(losses(llm, distiller, rows), plain_losses(llm, distiller, rows), strict=True):
            close(found, expected)
    with pytest.raises(ValueError, match="distill_len is 0"):
        make_distiller(llm, distill_len=0)


def test_matched_output_has_the_embeddings_scale_and_plain_output_the_norms(llm):
    batch = collate(training_rows())
    target = llm.get_input_embeddings().weight.pow(2).mean().sqrt().item()
    assert embedding_rms(llm.get_input_embeddings(), llm.config.vocab_size) == pytest.approx(target, rel=1e-5)
    matched, unmatched = make_distiller(llm, distill_len=16), make_distiller(llm, distill_len=16, start="plain")
    with torch.no_grad():
        rms, plain_rms = (d(batch["demo_ids"], batch["demo_mask"]).pow(2).mean().sqrt().item() for d in (matched, unmatched))
    assert rms == pytest.approx(target, rel=0.15)
    assert plain_rms == pytest.approx(1.0, rel=0.15) and target < 0.3  # a final norm's scale, far from the target
    assert unmatched.gain is None and "gain" not in unmatched.state_dict()


@pytest.mark.parametrize("length", [2, 4, 9])  # fewer demonstration tokens than vectors, as many, more
def test_residual_start_adds_the_last_tokens_embeddings(llm, length):
    """S_D = E_D[-l:] + gain * MEND(D)[-l:], 0 in the place of tokens that are not there; at first a tenth of E_D's scale."""
    matched, residual = make_distiller(llm, distill_len=4), make_distiller(llm, distill_len=4, start="residual")
    assert residual.gain.item() == pytest.approx(0.1 * matched.gain.item(), rel=1e-5)
    ids = list(range(5, 5 + length))
    batch = collate([{"demo": ids, "queries": [([3], [[4]])]}, {"demo": [7] * 12, "queries": [([3], [[4]])]}])
    expected = torch.zeros(4, llm.get_input_embeddings().embedding_dim)
    for i, token in enumerate(reversed(ids[-4:]), 1):
        expected[-i] = llm.get_input_embeddings()(torch.tensor(token)).detach()
    with torch.no_grad():
        found = residual(batch["demo_ids"], batch["demo_mask"])[0]
        close(found, expected + 0.1 * matched(batch["demo_ids"], batch["demo_mask"])[0])
    residual.train()
    residual(batch["demo_ids"], batch["demo_mask"]).sum().backward()
    assert all(p.grad is not None for n, p in residual.named_parameters() if not n.startswith("embed"))
    assert all(p.grad is None for p in llm.parameters())
    assert "residual_embed" not in " ".join(residual.state_dict())


@pytest.mark.parametrize("width", [16, 32])
def test_projection_stands_only_between_different_widths(gpt2, width):
    llm = load(gpt2)
    torch.manual_seed(0)
    backbone = GPT2Model(GPT2Config(vocab_size=llm.config.vocab_size, n_embd=width, n_layer=1, n_head=2, n_positions=64,
                                    initializer_range=0.2))
    n_before = sum(p.numel() for p in backbone.parameters())
    distiller = Distiller(backbone, backbone.get_input_embeddings(), 3, llm_width=32).eval()
    extra = sum(p.numel() for p in distiller.parameters()) - n_before - 3 * width
    batch = collate(training_rows())
    with torch.no_grad():
        vectors = distiller(batch["demo_ids"], batch["demo_mask"])
        embeds = torch.cat([distiller.embed(torch.tensor(training_rows()[1]["demo"])), distiller.placeholders])
        states = backbone(inputs_embeds=embeds[None]).last_hidden_state[0, -3:]
    assert vectors.shape == (3, 3, 32)
    if width == 32:
        assert extra == 0
        close(vectors[1], states)
    else:
        assert extra == 16 * 32 + 32
        weight, bias = (distiller.state_dict()[f"project.0.{name}"] for name in ("weight", "bias"))
        close(vectors[1], torch.tanh(states @ weight.T + bias))


def test_first_layers_of_all_layers_reproduce_the_llms_final_states(llm):
    ids = torch.tensor([ids_maker(4)(11)])
    with torch.no_grad():
        hidden = llm(ids, output_hidden_states=True).hidden_states
        close(first_layers(llm, 3).eval()(ids).last_hidden_state, hidden[-1])
        norm = llm.base_model.norm if llm.config.model_type == "llama" else llm.base_model.ln_f
        close(first_layers(llm, 2).eval()(ids).last_hidden_state, norm(hidden[2]))


def test_first_layers_are_a_trainable_fp32_copy(llm_folder):
    llm = load_llm(str(llm_folder), CPU, torch.bfloat16)
    before, backbone = copy.deepcopy(llm.state_dict()), first_layers(llm, 2)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in backbone.parameters())
    assert backbone.config.num_hidden_layers == 2 and llm.config.num_hidden_layers == 3
    with torch.no_grad():
        for p in backbone.parameters():
            p.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in llm.state_dict().items())


@pytest.mark.parametrize(("spec", "message"), [("layers:0", "layers:0.*has 3 layers.*layers:1 to layers:3"),
                                               ("layers:99", "layers:99.*has 3 layers.*layers:1 to layers:3"),
                                               ("layers:x", "layers:x: expected layers:N.*layers:6"),
                                               ("layers:-1", "layers:-1: expected layers:N"),
                                               ("layers:", "layers:: expected layers:N")])
def test_layer_counts_that_cannot_be_are_user_errors(llm, spec, message):
    with pytest.raises(UserError, match=message):
        make_distiller(llm, spec)


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def test_load_llm_freezes_it_in_the_dtype_asked_for(llm_folder):
    llm = load_llm(str(llm_folder), CPU, torch.bfloat16)
    assert llm.dtype == torch.bfloat16 and not llm.training and not any(p.requires_grad for p in llm.parameters())
    assert max_positions(llm.config) == (640 if llm.config.model_type == "gpt2" else 2048)


def test_load_llm_of_a_missing_folder_names_the_fix(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist; run `make assets`"):
        load_llm(str(tmp_path / "nowhere"), CPU, torch.float32)
    with pytest.raises(UserError, match="./nowhere does not exist; run `make assets`"):
        load_llm("./nowhere", CPU, torch.float32)


def test_load_llm_of_a_hub_name_without_a_hub_names_the_fix():
    for name in ("nobody/nothing-at-all", "no such/name/at all"):
        with pytest.raises(UserError, match="model hub, which does not answer.*make assets.*local folder"):
            load_llm(name, CPU, torch.float32)


def test_load_llm_of_broken_files_names_the_fix(llm_folder, tmp_path):
    def broken(name, damage):
        folder = shutil.copytree(llm_folder, tmp_path / name)
        damage(folder)
        with pytest.raises(UserError, match=f"{name} cannot be loaded.*cut short, fetch it again"):
            load_llm(str(folder), CPU, torch.float32)

    def cut(file):
        file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])

    broken("half-weights", lambda folder: cut(folder / "model.safetensors"))
    broken("empty-weights", lambda folder: (folder / "model.safetensors").write_bytes(b""))
    broken("half-config", lambda folder: cut(folder / "config.json"))
    broken("no-config", lambda folder: (folder / "config.json").unlink())
    broken("no-weights", lambda folder: (folder / "model.safetensors").unlink())


def test_load_llm_of_weights_that_do_not_fill_the_model_is_a_user_error(llm_folder, tmp_path):
    folder = shutil.copytree(llm_folder, tmp_path / "mixed")
    T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4).save_pretrained(folder)
    with pytest.raises(UserError, match="mixed lacks weights of its own configuration, such as .*; give a whole model"):
        load_llm(str(folder), CPU, torch.float32)


def args_for(spec: str, start: str) -> SimpleNamespace:
    return SimpleNamespace(distiller=spec, distill_len=4, vector_start=start, template="space")


def write_gpt2(folder, **changes):
    """A GPT-2 of another shape than the fixture's, with the same vocabulary size unless changed."""
    config = {"vocab_size": 420, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 640} | changes
    torch.manual_seed(1)
    GPT2LMHeadModel(GPT2Config(**config, initializer_range=0.2, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("kind", "start"), [("layers:2", "matched"), ("layers:2", "plain"), ("layers:2", "residual"), ("narrow", "residual"),
                                                    ("sibling", "matched"), ("narrow", "matched")])
def test_checkpoint_round_trip_gives_bitwise_equal_vectors(llm, llm_folder, tmp_path, kind, start):
    vocab = llm.config.vocab_size
    spec = {"sibling": str(llm_folder)}.get(kind, kind)
    if kind == "narrow":  # of another width: with a projection
        spec = str(write_gpt2(tmp_path / "narrow", n_embd=16, n_layer=1, n_head=2, vocab_size=vocab))
        copy_tokenizer(llm_folder, spec)
    distiller = make_distiller(llm, spec, start=start)
    torch.manual_seed(5)
    with torch.no_grad():
        for p in distiller.parameters():  # away from what building it again would give
            p.add_(0.05 * torch.randn_like(p))
    state = {"model": distiller_config(distiller, llm, args_for(spec, start)), "step": 7}
    save_checkpoint(tmp_path / "run" / "best.safetensors", distiller, state)
    if kind == "narrow":
        shutil.rmtree(tmp_path / "narrow")  # the checkpoint is enough
    again, found = load_distiller(tmp_path / "run", llm)
    batch = collate(training_rows())
    with torch.no_grad():
        assert torch.equal(again.eval()(batch["demo_ids"], batch["demo_mask"]),
                           distiller(batch["demo_ids"], batch["demo_mask"]))
    assert found == json.loads(json.dumps(state))
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {n for n, _ in distiller.named_parameters()}


# ---------------------------------------------------------------------------------------------------------------------
# Free vectors (PromptTuning)


def test_free_vectors_start_like_placeholders_and_ignore_the_demonstrations(llm):
    free, batch = build_distiller("free", llm, 6, "matched", 3), collate(training_rows())
    assert [name for name, _ in free.named_parameters()] == ["vectors"] and free.distill_len == 6
    assert torch.equal(free.vectors, make_distiller(llm, distill_len=6, seed=3).placeholders)  # both of the LLM's width
    vectors = free(batch["demo_ids"], batch["demo_mask"])
    assert vectors.shape == (3, 6, 32) and all(torch.equal(v, free.vectors) for v in vectors)
    assert torch.equal(free(batch["demo_ids"][:, :0], batch["demo_mask"][:, :0]), vectors)
    with pytest.raises(ValueError, match="distill_len is 0; at least one vector is needed"):
        build_distiller("free", llm, 0, "matched", 3)


def test_gradient_of_free_vectors_equals_the_plain_one(llm):
    """Over a whole batch, whose rows share the vectors."""
    free, rows = build_distiller("free", llm, 4, "matched", 0), training_rows()
    sum(losses(llm, free, rows)).backward()
    found = gradients(free)
    teachers = [plain.embed(llm, row["demo"]) for row in rows]
    students = [free.vectors] * len(rows)
    sum(losses_of_prefixes(llm, rows, students, teachers)).backward()
    assert_same_gradients(found, gradients(free))


def test_free_vectors_come_back_from_a_checkpoint(llm, tmp_path):
    free = build_distiller("free", llm, 4, "matched", 0)
    with torch.no_grad():
        free.vectors.add_(0.5)
    state = {"model": distiller_config(free, llm, args_for("free", "matched"))}
    save_checkpoint(tmp_path / "run" / "best.safetensors", free, state)
    again, found = load_distiller(tmp_path / "run", llm)
    assert torch.equal(again.vectors, free.vectors) and again.vectors.requires_grad
    assert found["model"]["backbone"] is None and found["model"]["distiller"] == "free"


@pytest.mark.parametrize("changes", [{"n_embd": 16}, {"vocab_size": 421}, {"n_layer": 2}, {"folder": "other"}])
def test_load_distiller_for_another_llm_is_a_user_error(tmp_path, changes):
    llm = load(write_gpt2(tmp_path / "own" / "tiny"))
    distiller = make_distiller(llm)
    state = {"model": distiller_config(distiller, llm, args_for("layers:2", "matched"))}
    save_checkpoint(tmp_path / "run" / "last.safetensors", distiller, state)
    load_distiller(tmp_path / "run", load(shutil.copytree(tmp_path / "own" / "tiny", tmp_path / "moved" / "tiny")))
    changes = dict(changes)
    other = load(write_gpt2(tmp_path / "another" / changes.pop("folder", "tiny"), **changes))
    with pytest.raises(UserError, match="was trained for the LLM .*give its own --llm, or another checkpoint"):
        load_distiller(tmp_path / "run", other)


def copy_tokenizer(source, target):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / file, target)


def test_a_sibling_of_another_tokenizer_is_a_user_error_that_names_the_tokens(llm, llm_folder, tmp_path):
    sibling = write_gpt2(tmp_path / "sibling", n_layer=1, vocab_size=llm.config.vocab_size)
    copy_tokenizer(llm_folder, sibling)
    make_distiller(llm, str(sibling))
    spec = json.loads((sibling / "tokenizer.json").read_text())
    vocab = spec["model"]["vocab"]
    vocab["river?"] = vocab.pop("Ġriver")
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (sibling / "tokenizer.json").write_text(json.dumps(spec | {"model": spec["model"] | {"merges": []}}))
    with pytest.raises(UserError, match=rf"4 tokens differ, such as 'a' \({vocab['b']} in the LLM's, {vocab['a']} in the "
                                        rf"distiller's\), 'b' .*'river\?' \(not there in the LLM's, {vocab['river?']} in"):
        make_distiller(llm, str(sibling))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (sibling / file).unlink()
    with pytest.raises(UserError, match="does not share the tokenizer|has no tokenizer beside it"):
        make_distiller(llm, str(sibling))


def test_a_sibling_with_more_embedding_rows_than_tokens_is_welcome(llm, llm_folder, tmp_path):
    """Qwen2.5-0.5B and -7B share a tokenizer and pad their embeddings to different sizes."""
    sibling = write_gpt2(tmp_path / "sibling", n_layer=1, vocab_size=llm.config.vocab_size + 8)
    copy_tokenizer(llm_folder, sibling)
    batch = collate(training_rows())
    assert make_distiller(llm, str(sibling))(batch["demo_ids"], batch["demo_mask"]).isfinite().all()


def test_a_sibling_that_is_broken_or_missing_is_a_user_error(llm, tmp_path):
    sibling = write_gpt2(tmp_path / "sibling", n_layer=1)
    (sibling / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="sibling cannot be loaded.*give layers:N"):
        make_distiller(llm, str(sibling))
    with pytest.raises(UserError, match="--distiller .*nowhere"):
        make_distiller(llm, str(tmp_path / "nowhere"))


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
