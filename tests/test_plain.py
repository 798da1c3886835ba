"""Tests of plain.py: its functions against hand-worked numbers and an LLM's own forward; the toy run."""

import ast
import json
import math
import random
import runpy
import sys
import time

import pytest
import torch
from torch.distributions import Categorical
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

import plain
from common import ROOT

V, D, X, Y = 40, [5, 9, 3, 3, 17, 8], [21, 4, 30], [7, 12]


def gpt2(width: int = 32, seed: int = 0) -> GPT2LMHeadModel:
    """Weights large enough for attention to matter; no dropout."""
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=V, n_embd=width, n_layer=2, n_head=4, n_positions=64,
                        initializer_range=0.2, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def llm():
    return gpt2()


@pytest.fixture(scope="module")
def t5():
    torch.manual_seed(0)
    config = T5Config(vocab_size=V, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
                      decoder_start_token_id=0, pad_token_id=0)
    return T5ForConditionalGeneration(config).eval().requires_grad_(False)


def close(found, expected):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), atol=1e-5, rtol=1e-5)


def test_distill_loss_is_the_forward_kl_averaged_over_tokens():
    """KL((3/4, 1/4) || (1/2, 1/2)) at the first token, 0 at the second; the other way it is larger."""
    teacher, student = (torch.tensor([[p, 1 - p], [0.5, 0.5]]).log() for p in (0.75, 0.5))
    close(plain.distill_loss(student, teacher), (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2)
    close(plain.distill_loss(teacher, student), (0.5 * math.log(2 / 3) + 0.5 * math.log(2)) / 2)
    close(plain.distill_loss(student + 3, teacher - 2), plain.distill_loss(student, teacher))


def test_pred_and_finetune_loss_by_hand():
    student = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4]]).log() + 5
    close(plain.pred_loss(student, [0, 2]), -(math.log(0.7) + math.log(0.4)) / 2)
    assert plain.finetune_loss(torch.tensor(2.0), torch.tensor(3.0), 0.1).item() == pytest.approx(2.3)


def test_read_gives_the_logits_that_predict_x_and_y(llm):
    logits = llm(torch.tensor([D + X + Y])).logits[0]
    close(plain.read(llm, plain.embed(llm, D), X, Y), logits[len(D) - 1:-1])
    close(plain.read(llm, plain.embed(llm, D), X + Y, []), logits[len(D) - 1:-1])


def test_nothing_predicts_the_first_token_behind_an_empty_prefix(llm):
    found = plain.read(llm, plain.embed(llm, []), X, Y)
    close(found, llm(torch.tensor([X + Y])).logits[0, :-1])
    assert len(found) == len(X + Y) - 1


def test_an_encoder_decoder_predicts_y_alone(t5):
    expected = t5(input_ids=torch.tensor([D + X]), decoder_input_ids=torch.tensor([[0, *Y[:-1]]])).logits[0]
    close(plain.read(t5, plain.embed(t5, D), X, Y), expected)


@pytest.mark.parametrize("name", ["llm", "t5"])
def test_score_options_is_the_mean_log_likelihood(name, request):
    llm, options = request.getfixturevalue(name), [[7], [12, 33, 1], [2, 2]]
    expected = []
    for option in options:
        if name == "t5":
            shifted = torch.tensor([[0, *option[:-1]]])
            logits = llm(input_ids=torch.tensor([D + X]), decoder_input_ids=shifted).logits[0]
        else:
            logits = llm(torch.tensor([D + X + option])).logits[0, len(D + X) - 1:-1]
        expected.append(Categorical(logits=logits).log_prob(torch.tensor(option)).mean())
    close(plain.score_options(llm, plain.embed(llm, D), X, options), torch.stack(expected))


@pytest.mark.parametrize("width", [32, 16])
def test_vectors_are_the_last_states_behind_the_demonstrations(llm, width):
    sibling = gpt2(width, seed=1)
    distiller = plain.Distiller(sibling, llm, 3)
    assert isinstance(distiller.project, torch.nn.Identity) == (width == 32)
    with torch.no_grad():
        # embeddings of tokens, so that the sibling's own forward can read them as ids
        distiller.placeholders.copy_(plain.embed(sibling, [11, 13, 2]))
        states = sibling.transformer(torch.tensor([[*D, 11, 13, 2]])).last_hidden_state[0, -3:]
        if width == 16:
            states = torch.tanh(states @ distiller.project[0].weight.T + distiller.project[0].bias)
        close(distiller(D), distiller.gain * states)
        distiller.gain = None
        close(distiller(D), states)


def test_placeholders_are_token_embeddings_and_vectors_start_at_their_scale(llm):
    sibling = gpt2(16, seed=1)
    distiller = plain.Distiller(sibling, llm, 8)
    rows = sibling.get_input_embeddings().weight                                         # (V, d_s)
    assert (distiller.placeholders[:, None] == rows).all(dim=2).any(dim=1).all()
    assert distiller(D).std().item() == pytest.approx(llm.get_input_embeddings().weight.std().item(), rel=0.3)


def test_the_gradient_flows_through_the_llm_to_the_distiller_alone(llm):
    sibling = gpt2(16, seed=1).requires_grad_(True)
    distiller = plain.Distiller(sibling, llm, 3)
    teacher, student = plain.teacher_and_student(llm, D, distiller(D), X, Y)
    close(teacher, llm(torch.tensor([D + X + Y])).logits[0, len(D) - 1:-1])
    assert not teacher.requires_grad and teacher.shape == student.shape
    (plain.pred_loss(student[-2:], Y) + plain.distill_loss(student, teacher)).backward()
    assert all(p.grad is None for p in llm.parameters())
    used = {name: p.grad for name, p in distiller.named_parameters() if not name.startswith("embed.")}
    assert all(grad is not None and grad.abs().max() > 0 for grad in used.values())


def test_a_task_can_only_be_told_from_its_demonstrations():
    assert len({*plain.UNSEEN, *plain.SEEN}) == 256 and not {*plain.UNSEEN} & {*plain.SEEN}
    rule = plain.SEEN[0]
    pairs = plain.examples(random.Random(0), rule, plain.K)
    text = [plain.WORDS[i] for i in plain.concat(pairs)]
    assert len(text) == 3 * plain.K and sorted(text[1::3]) == sorted([*plain.LABELS] * 3)
    label_of = dict(zip(plain.LABELS, rule, strict=True))
    assert [label_of[sign] for sign in text[1::3]] == text[2::3]
    assert len({*text[-plain.L:]} & {*plain.LABELS}) == 1  # truncation keeps one of the four signs


@pytest.fixture
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_short_run_prints_its_figures_and_repeats_them(capsys, same_threads):
    steps = {"teach_steps": 5, "pretrain_steps": 2, "finetune_steps": 2, "n_tasks": 3}
    figures = plain.main(**steps)
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == figures
    methods = ["zero_shot", "icl", "truncation", "mend", "swapped"]
    assert list(figures) == [*methods, "seconds"] and all(0 <= figures[m] <= 1 for m in methods)
    assert [line.split()[0] for line in lines[-6:-1]] == methods
    printed = [float(line.split()[-1]) for line in lines[-6:-1]]
    assert printed == pytest.approx([figures[m] for m in methods], abs=6e-4)
    assert {line.split(" step ")[0].strip() for line in lines if " s to go" in line} == {
        "teaching the LLM", "teaching its sibling", "MEND, stage 1, Eq. (3)", "MEND, stage 2, Eq. (4)"}
    again = plain.main(**steps)
    assert {m: again[m] for m in methods} == {m: figures[m] for m in methods}


@pytest.mark.slow
def test_mend_passes_on_what_unseen_demonstrations_say(same_threads):
    start = time.process_time()  # not the clock: other work may share the cores
    figures = plain.main()
    assert time.process_time() - start < 180
    assert figures["icl"] > 0.9 and figures["mend"] > 0.9 * figures["icl"], figures
    assert figures["mend"] - figures["truncation"] > 0.2, figures
    assert figures["mend"] - figures["swapped"] > 0.3, figures
    assert figures["swapped"] < 0.35 and figures["zero_shot"] < 0.35, figures  # chance is 0.25


def test_it_is_one_page_that_imports_nothing_of_ours():
    source = (ROOT / "plain.py").read_text(encoding="utf-8")
    lines = source.splitlines()
    assert len(lines) <= 220 and max(map(len, lines)) <= 110
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"torch", "transformers"}


def test_importing_it_prints_nothing(capsys):
    runpy.run_path(str(ROOT / "plain.py"), run_name="imported")
    assert capsys.readouterr() == ("", "")
