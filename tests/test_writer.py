"""Tests of serving/writer.py: a batch after a cache against one query at a time without one, and sampling
against transformers' own filters."""

import math
import random

import pytest
import torch
from conftest import load
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, MistralForCausalLM, T5Config
from transformers import T5ForConditionalGeneration as T5
from transformers.generation import TemperatureLogitsWarper, TopPLogitsWarper

import common
import plain
from data import Formatter
from serving import writer as module
from serving.writer import Text, Writer, choose
from sources.text import Tokenizer
from variants import KeyValueDistiller

INPUTS = ["the river is cold", "rain", "people talk of rain and ships and small green houses",
          "war and trade"]


@pytest.fixture
def formatter(llm_folder):
    return Formatter(Tokenizer(str(llm_folder)), "space", 900)


def vectors_for(llm, n: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return 0.2 * torch.randn(n, llm.get_input_embeddings().embedding_dim, generator=generator)


@torch.no_grad()
def one_by_one(llm, formatter, vectors, text: str, steps: int, pick) -> list[int]:
    """An answer's ids by whole passes over [head ; vectors ; query ; answer], without cache or batch."""
    prefix = torch.cat([plain.embed(llm, formatter.turns.head), vectors])
    x, written = formatter.query({"input": text}, first=len(vectors) == 0), []
    while len(written) < steps and (not written or written[-1] != llm.config.eos_token_id):
        written.append(pick(plain.read(llm, prefix, x, [*written, 0])[-1]))
    return written


def as_text(formatter, ids: list[int], stop: str = "\n") -> str:
    text = formatter.tokenizer.hf.decode(ids, skip_special_tokens=True).strip()
    return (text.split(stop)[0] if stop else text).strip()


def greedy(logits: torch.Tensor) -> int:
    return int(logits.argmax())


def test_an_answer_is_written_behind_the_templates_own_words(llm, llm_folder):
    for template, words in (("space", ""), ("newline", ""), ("input-output", "\nOutput:")):
        formatter = Formatter(Tokenizer(str(llm_folder)), template, 900)
        ids = Writer(llm, formatter, vectors_for(llm)).query_ids("the river")
        assert ids == formatter.query({"input": "the river"}) + formatter.tokenizer.reference(words)
        scored = formatter.query({"input": "the river"}) + formatter.answer("happy")
        assert scored[:len(ids)] == ids and len(scored) > len(ids)  # what is written is what is scored


@pytest.mark.parametrize("n, head", [(5, []), (5, [7]), (0, [7]), (0, [])])
def test_a_batch_behind_a_cache_writes_what_each_query_gets_alone_without(llm, formatter, n, head):
    formatter.turns.head = head
    vectors = vectors_for(llm, n)
    writer = Writer(llm, formatter, vectors)
    for how in ({}, {"batch_size": 3}, {"batch_size": 1}):
        found = writer.write(INPUTS, max_new_tokens=9, stop="", **how)
        for text, answer in zip(INPUTS, found, strict=True):
            assert answer == as_text(formatter, one_by_one(llm, formatter, vectors, text, 9, greedy), "")
    assert len({*found}) > 1


def test_tokens_are_the_same_where_windows_slide_and_rows_end_at_different_steps(llama, texts):
    torch.manual_seed(4)
    formatter = Formatter(Tokenizer(str(llama)), "space", 900)
    llm = MistralForCausalLM(MistralConfig(
        vocab_size=383, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=6, initializer_range=0.4, eos_token_id=0)).eval()
    vectors = vectors_for(llm)
    expected = [one_by_one(llm, formatter, vectors, text, 12, greedy) for text in INPUTS]
    llm.generation_config.eos_token_id = llm.config.eos_token_id = [expected[0][3], expected[2][6]]
    ends = [[i for i, t in enumerate(ids) if t in llm.config.eos_token_id] for ids in expected]
    expected = [ids[:1 + min(end, default=len(ids))] for ids, end in zip(expected, ends, strict=True)]
    assert len({len(ids) for ids in expected}) > 2
    Writer(llm, formatter, vectors).write(INPUTS, max_new_tokens=12, stop="")
    assert [text.ids for text in texts] == expected


def test_an_encoder_decoder_writes_the_same_in_a_batch(llama, texts):
    torch.manual_seed(1)
    formatter = Formatter(Tokenizer(str(llama)), "space", 900)
    llm = T5(T5Config(vocab_size=383, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, eos_token_id=1,
                      decoder_start_token_id=0, pad_token_id=0, initializer_factor=3.0)).eval()
    for n in (5, 0):
        vectors = vectors_for(llm, n)
        expected = [one_by_one(llm, formatter, vectors, text, 7, greedy) for text in INPUTS]
        texts.clear()
        Writer(llm, formatter, vectors).write(INPUTS, max_new_tokens=7, stop="")
        assert [text.ids for text in texts] == expected and len({*map(tuple, expected)}) > 1


def test_keys_and_values_in_place_of_vectors(llm, formatter):
    distiller = KeyValueDistiller(llm, 5, rank=2).eval()
    ids = torch.tensor([formatter.tokenizer.encode("the small boat goes past green hills and houses")])
    with torch.no_grad():
        made = distiller(ids, torch.ones_like(ids, dtype=torch.bool))[0]
    writer = Writer(llm, formatter, made)
    alone = [writer.write([text], max_new_tokens=6, stop="")[0] for text in INPUTS]
    assert writer.write(INPUTS, max_new_tokens=6, stop="") == alone and len({*alone}) > 1


def test_a_sample_is_a_function_of_seed_and_input_alone(llm, formatter, monkeypatch):
    vectors = vectors_for(llm)
    writer, how = Writer(llm, formatter, vectors), {"max_new_tokens": 8, "stop": "", "temperature": 1.5}
    together = writer.write(INPUTS, seed=1, **how)
    assert together == writer.write(INPUTS, seed=1, **how)
    assert together == [writer.write([text], seed=1, **how)[0] for text in INPUTS]
    assert together == writer.write(INPUTS[::-1], seed=1, batch_size=3, **how)[::-1]
    assert len({*together, *writer.write(INPUTS, seed=2, **how)}) == 2 * len(INPUTS)
    # and it is what the page's uncached passes and transformers' filters give, number by number
    for text, answer in zip(INPUTS, writer.write(INPUTS, seed=3, top_p=0.8, **how), strict=True):
        draw = random.Random(f"3 {formatter.query({'input': text})}")

        def pick(logits, draw=draw):
            scores = TopPLogitsWarper(0.8)(None, TemperatureLogitsWarper(1.5)(None, logits[None]))
            left, number = scores[0].softmax(dim=0).double().tolist(), draw.random()
            for token, p in enumerate(left):  # the token in whose share of [0, 1) the number falls
                number -= p
                if number < 0:
                    return token
            raise AssertionError(number)

        assert answer == as_text(formatter, one_by_one(llm, formatter, vectors, text, 8, pick), "")


def test_draws_follow_the_softmax():
    logits, n = torch.tensor([[0.5, -1.0, 2.0, 0.0, 1.0]]), 4000
    draws = [random.Random(i) for i in range(n)]
    for top_p, left in ((1.0, [0, 1, 2, 3, 4]), (0.7, [2, 4])):  # 0.56 and 0.21 of the probability
        found = choose(logits.expand(n, -1), 2.0 if top_p == 1 else 1.0, top_p, draws)
        shares = (logits[0, left] / (2.0 if top_p == 1 else 1.0)).softmax(dim=0)
        counts = torch.bincount(found, minlength=5)
        assert counts.sum() == counts[left].sum() == n
        off = (counts[left] - n * shares) / (n * shares * (1 - shares)).sqrt()
        assert off.abs().max() < 4
    assert choose(logits, 1e-6, 1.0, draws[:1]).tolist() == [2] == choose(logits, 0, 1.0, draws[:1]).tolist()


def test_the_prefix_is_read_once_and_each_token_alone(llm, formatter, monkeypatch):
    lengths = []
    run = module.run_backbone
    monkeypatch.setattr(module, "run_backbone",
                        lambda *a: lengths.append(tuple(a[1].shape[:2])) or run(*a))
    writer = Writer(llm, formatter, vectors_for(llm, 40))
    for _ in range(2):
        lengths.clear()
        writer.write(INPUTS, max_new_tokens=4, stop="")
        longest = max(len(formatter.query({"input": text})) for text in INPUTS)
        assert lengths[0] == (4, longest) and all(shape[1] == 1 for shape in lengths[1:])


def test_pieces_come_as_they_are_written_and_make_the_answers(llm, formatter, monkeypatch):
    writer, steps = Writer(llm, formatter, vectors_for(llm)), []
    monkeypatch.setattr(module, "choose", lambda *a: steps.append(0) or choose(*a))
    how = {"max_new_tokens": 12, "stop": "", "temperature": 1.0, "seed": 5}
    pieces, when = [], []
    for piece in writer.stream(INPUTS, **how):
        pieces.append(piece)
        when.append(len(steps))
    answers = ["".join(piece for number, piece in pieces if number == i) for i in range(len(INPUTS))]
    assert answers == writer.write(INPUTS, **how) and "" not in [piece for _, piece in pieces]
    assert when[0] < 4 < 10 < when[-1]


class Letters:
    """A tokenizer whose ids are the bytes of UTF-8; 0 is special."""

    def __init__(self):
        self.hf = self

    def decode(self, ids, skip_special_tokens):
        return bytes(i for i in ids if i).decode(errors="replace")


@pytest.mark.parametrize("content, stop, pieces", [
    (b"\n he is \n no", "\n", ["h", "e", " i", "s"]),
    (b"a b \0c", "", ["a", " b"]),
    ("éa€b".encode(), "", ["é", "a", "€", "b"]),
    (b"x# #y##z", "##", ["x", "#", " #y"]),
    (b"x##", "###", ["x", "##"]),
    (b"\n\n\n", "\n", []),
])
def test_text_is_told_once_it_is_certain(content, stop, pieces):
    writer = type("W", (), {"formatter": type("F", (), {"tokenizer": Letters()}), "ends": {0}})
    text, found = Text(writer, stop), []
    for i, byte in enumerate(content):
        found += [text.add(byte, last=i + 1 == len(content))]
        if text.over:
            break
    assert [piece for piece in found if piece] == pieces


def test_a_bf16_llm_of_transformers_writes(llama, formatter):
    if formatter.tokenizer.name != str(llama):
        return
    llm = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
    vectors = vectors_for(llm)
    found = Writer(llm, formatter, vectors).write(INPUTS[:2], max_new_tokens=1, stop="")
    for text, answer in zip(INPUTS, found, strict=False):
        (best,) = one_by_one(llm, formatter, vectors.bfloat16(), text, 1, greedy)
        assert answer == as_text(formatter, [best], "")


def test_what_cannot_be_written_is_refused(gpt2, llama):
    llm = load(gpt2)
    writer = Writer(llm, Formatter(Tokenizer(str(gpt2)), "space", 900), vectors_for(llm, 600))
    for inputs, how, message in (
            (["a"], {"max_new_tokens": 60}, "the LLM has 640"), ([" "], {}, "an input is empty"),
            (["a"], {"max_new_tokens": 0}, "1 or more"), (["a"], {"temperature": -1}, "temperature is -1"),
            (["a"], {"temperature": math.nan}, "temperature is nan"), (["a"], {"top_p": 0.0}, "top_p is 0")):
        with pytest.raises(common.UserError, match=message):
            writer.write(inputs, **how)
    assert writer.write([]) == []
    broken = Writer(llm, writer.formatter, vectors_for(llm))
    broken.prefix.keys_values[0][1][:] = math.nan
    with pytest.raises(common.UserError, match="is not finite"):
        broken.write(["a"])
    flash = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=1, hidden_size=8, vocab_size=9,
                                                         num_attention_heads=1, intermediate_size=8))
    flash.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(common.UserError, match="attn_implementation"):
        Writer(flash, writer.formatter, vectors_for(flash))
