"""Tests of model.py: reading in packed, cached, padded batches equals plain.py, and so do the distiller's
vectors."""

import copy
import math

import pytest
import torch
from conftest import (
    LogitsAreStates,
    close,
    demos,
    ids_maker,
    load,
    losses,
    make_distiller,
    scoring_rows,
    training_rows,
    ways,
    where,
)
from conftest import plain_losses as losses_of_prefixes
from transformers import AutoModelForCausalLM, GPT2Config, GPT2Model

import plain
from data import collate
from loading import build_distiller, embedding_rms
from model import Distiller, attention_mask, demo_prefix, head_logits, query_states, vector_prefix, with_head
from score import finetune_loss, score_options

BOS = 7


def plain_losses(llm, distiller, rows, head=()):
    bos = plain.embed(llm, list(head))
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


def test_head_logits_feel_the_cap():
    logits = head_logits(LogitsAreStates(final_logit_softcapping=2.0), torch.tensor([[3.0, -1.0]]))
    close(logits, [[2 * math.tanh(1.5), 2 * math.tanh(-0.5)]], 1e-6)


@pytest.mark.parametrize("kind", ["demonstrations", "vectors"])
@pytest.mark.parametrize("head", [[], [BOS], [BOS, 9, 4]])
def test_query_states_equal_plain_states_and_logits(llm, kind, head):
    rows = scoring_rows()
    batch, distiller = collate(rows), make_distiller(llm)
    bos = plain.embed(llm, list(head))
    with torch.no_grad():
        if kind == "vectors":
            prefix = vector_prefix(llm, distiller(*demos(batch)), head)
            plain_prefixes = [torch.cat([bos, plain.Distiller.forward(distiller, row["demo"])])
                              for row in rows]
        else:
            prefix = demo_prefix(llm, *demos(batch), head)
            plain_prefixes = [torch.cat([bos, plain.embed(llm, row["demo"])]) for row in rows]
        states = query_states(llm, prefix, batch)
        checked = torch.zeros_like(batch["query_mask"])
        for b, s, o, x, option in ways(rows):
            at_x, at_option = where(batch, b, s, 0), where(batch, b, s, o)
            ids = batch["query_ids"][b]
            assert ids[at_x].tolist() + ids[at_option].tolist() == x + option
            found = torch.cat([states[b][at_x], states[b][at_option]])
            plain_prefix = plain_prefixes[b]
            embeds = torch.cat([plain_prefix, plain.embed(llm, x + option)])
            expected = llm(inputs_embeds=embeds[None], output_hidden_states=True).hidden_states[-1][0]
            close(found, expected[len(plain_prefix) - 1:-1])
            close(head_logits(llm, found), plain.read(llm, plain_prefix, x, option))
            checked[b] |= at_x | at_option
    assert torch.equal(checked, batch["query_mask"])


def test_losses_behind_a_bos_equal_plain_losses(llm):
    distiller = make_distiller(llm)
    with torch.no_grad():
        found, expected = (way(llm, distiller, training_rows(), [BOS]) for way in (losses, plain_losses))
    close(torch.stack(found), torch.stack(expected))
    assert expected[1] > 0.01


def test_queries_and_options_do_not_see_each_other(llm):
    rows, ids = scoring_rows(), ids_maker(9)

    def scores(rows):
        batch = collate(rows)
        return score_options(llm, demo_prefix(llm, *demos(batch)), batch)

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
        # inf - inf is nan: missing options
        moved = (scores(changed(b, s, o)) - before).nan_to_num().abs() > 1e-5
        expected = torch.zeros_like(moved)
        expected[b, s, (o - 1) if o else slice(len(rows[b]["queries"][s][1]))] = True
        assert torch.equal(moved, expected), f"changing {b}, {s}, {o} moved {moved.nonzero().tolist()}"


def test_attention_mask_worked_by_hand():
    """One pad, one prefix token; x of two tokens, options of one and two, a query of one, one pad."""
    mask = attention_mask(torch.tensor([[False, True]]), torch.tensor([[0, 0, 0, 0, 0, 1, 0]]),
                          torch.tensor([[0, 0, 1, 2, 2, 0, 0]]), torch.tensor([[True] * 6 + [False]]))
    assert mask.shape == (1, 1, 7, 9)
    expected = ["01 1000000", "01 1100000", "01 1110000", "01 1101000", "01 1101100", "01 0000010"]
    found = ["".join(str(int(v)) for v in row[:2]) + " " + "".join(str(int(v)) for v in row[2:])
             for row in mask[0, 0]]
    assert found[:6] == expected
    assert found[6][-1] == "1"  # a pad's own row is of no interest, but must not be empty


def test_gradient_through_the_shared_prefix_equals_the_sum_of_separate_ones(llm):
    """The plain way distils anew for each query and backpropagates separately."""
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
    prefix = demo_prefix(llm, *demos(batch))
    before = copy.deepcopy(prefix)
    first = query_states(llm, prefix, batch)
    query_states(llm, prefix, other)
    assert torch.equal(query_states(llm, prefix, batch), first)
    for (keys, values), (old_keys, old_values) in zip(prefix.keys_values, before.keys_values, strict=True):
        assert torch.equal(keys, old_keys) and torch.equal(values, old_values)
    assert torch.equal(prefix.state, before.state) and torch.equal(prefix.mask, before.mask)


def test_eager_attention_gives_the_same_as_sdpa(llm, llm_folder):
    eager = AutoModelForCausalLM.from_pretrained(llm_folder,
                                                 attn_implementation="eager").eval().requires_grad_(False)
    assert llm.config._attn_implementation == "sdpa" and eager.config._attn_implementation == "eager"
    batch, distillers = collate(scoring_rows()), (make_distiller(llm), make_distiller(eager))
    assert distillers[1].backbone.config._attn_implementation == "eager"
    with torch.no_grad():
        vectors, eager_vectors = (d(*demos(batch)) for d in distillers)
        close(eager_vectors, vectors)
        for prefix in (lambda m: vector_prefix(m, vectors), lambda m: demo_prefix(m, *demos(batch))):
            close(*(query_states(m, prefix(m), batch)[batch["query_mask"]] for m in (eager, llm)))


def test_a_head_stands_before_the_first_real_token(llm):
    torch.manual_seed(0)
    embeds, mask = torch.randn(3, 4, 32), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]]).bool()
    out, out_mask = with_head(llm, embeds, mask, [BOS, 5])
    head = llm.get_input_embeddings().weight[[BOS, 5]]
    assert out_mask.long().tolist() == [[0, 0, 1, 1, 1, 1], [1] * 6, [0, 0, 0, 1, 1, 1]]
    for b in range(3):
        real = embeds[b][mask[b]]
        assert torch.equal(out[b][out_mask[b]], torch.cat([head, real]))
    same, same_mask = with_head(llm, embeds, mask, [])
    assert same is embeds and same_mask is mask


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
        assert distiller(*demos(batch)).shape == (3, 1, 32)
        for found, expected in zip(losses(llm, distiller, rows), plain_losses(llm, distiller, rows),
                                   strict=True):
            close(found, expected)
    with pytest.raises(ValueError, match="distill_len is 0"):
        make_distiller(llm, distill_len=0)


def test_matched_output_has_the_embeddings_scale_and_plain_output_the_norms(llm):
    batch = collate(training_rows())
    target = llm.get_input_embeddings().weight.pow(2).mean().sqrt().item()
    assert embedding_rms(llm.get_input_embeddings(), llm.config.vocab_size) == pytest.approx(target, rel=1e-5)
    matched, unmatched = (make_distiller(llm, distill_len=16, start=start) for start in ("matched", "plain"))
    with torch.no_grad():
        rms, plain_rms = (d(*demos(batch)).pow(2).mean().sqrt().item() for d in (matched, unmatched))
    assert rms == pytest.approx(target, rel=0.15)
    # a final norm's scale, far from the target
    assert plain_rms == pytest.approx(1.0, rel=0.15) and target < 0.3
    assert unmatched.gain is None and "gain" not in unmatched.state_dict()


@pytest.mark.parametrize("length", [2, 4, 9])  # fewer demonstration tokens than vectors, as many, more
def test_residual_start_adds_the_last_tokens_embeddings(llm, length):
    """S_D = E_D[-l:] + gain * MEND(D)[-l:], 0 where there is no token; the gain starts at 0.1."""
    matched, residual = make_distiller(llm), make_distiller(llm, start="residual")
    assert residual.gain.item() == pytest.approx(0.1 * matched.gain.item(), rel=1e-5)
    ids = list(range(5, 5 + length))
    batch = collate([{"demo": ids, "queries": [([3], [[4]])]}, {"demo": [7] * 12, "queries": [([3], [[4]])]}])
    expected = torch.zeros(4, llm.get_input_embeddings().embedding_dim)
    for i, token in enumerate(reversed(ids[-4:]), 1):
        expected[-i] = llm.get_input_embeddings()(torch.tensor(token)).detach()
    with torch.no_grad():
        found = residual(*demos(batch))[0]
        close(found, expected + 0.1 * matched(*demos(batch))[0])
    residual.train()
    residual(*demos(batch)).sum().backward()
    assert all(p.grad is not None for n, p in residual.named_parameters() if not n.startswith("embed"))
    assert all(p.grad is None for p in llm.parameters())
    assert "residual_embed" not in " ".join(residual.state_dict())


@pytest.mark.parametrize("width", [16, 32])
def test_projection_stands_only_between_different_widths(width):
    torch.manual_seed(0)
    backbone = GPT2Model(GPT2Config(vocab_size=300, n_embd=width, n_layer=1, n_head=2, n_positions=64,
                                    initializer_range=0.2))
    n_before = sum(p.numel() for p in backbone.parameters())
    distiller = Distiller(backbone, backbone.get_input_embeddings(), 3, llm_width=32).eval()
    extra = sum(p.numel() for p in distiller.parameters()) - n_before - 3 * width
    batch = collate(training_rows())
    with torch.no_grad():
        vectors = distiller(*demos(batch))
        embeds = torch.cat([distiller.embed(torch.tensor(training_rows()[1]["demo"])),
                            distiller.placeholders])
        states = backbone(inputs_embeds=embeds[None]).last_hidden_state[0, -3:]
    assert vectors.shape == (3, 3, 32)
    if width == 32:
        assert extra == 0
        close(vectors[1], states)
    else:
        assert extra == 16 * 32 + 32
        weight, bias = (distiller.state_dict()[f"project.0.{name}"] for name in ("weight", "bias"))
        close(vectors[1], torch.tanh(states @ weight.T + bias))


def test_free_vectors_start_like_placeholders_and_ignore_the_demonstrations(llm):
    free, batch = build_distiller("free", llm, 6, "matched", 3), collate(training_rows())
    assert [name for name, _ in free.named_parameters()] == ["vectors"] and free.distill_len == 6
    # both of the LLM's width
    assert torch.equal(free.vectors, make_distiller(llm, distill_len=6, seed=3).placeholders)
    vectors = free(*demos(batch))
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


@pytest.mark.parametrize("width", [16, 32])
def test_a_distiller_is_built_where_its_backbone_is(width, monkeypatch):
    """The scale is measured while it is built: by then all of it is on the LLM's device, here meta."""
    places, linear = [], torch.nn.Linear.forward
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda layer, x: (
        places.append((x.device.type, layer.weight.device.type)), linear(layer, x))[1])
    with torch.device("meta"):
        backbone = GPT2Model(GPT2Config(vocab_size=50, n_embd=width, n_layer=1, n_head=4, n_positions=128))
    distiller = Distiller(backbone, backbone.get_input_embeddings(), 4, 32, output_rms=1.0)
    assert {*places} == ({("meta", "meta")} if width != 32 else set())
    assert {p.device.type for name, p in distiller.named_parameters() if name != "gain"} == {"meta"}


def test_l_may_take_nearly_all_positions_of_the_distiller(gpt2):
    llm = load(gpt2)  # 640 learned positions
    assert build_distiller("layers:2", llm, 630, "matched", seed=0).gain > 0
