"""Tests of template.py and of what reads by it: --template chat against the tokenizer's own chat template."""

import json
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    example,
    make_distiller,
    plain_scores,
    save_distiller,
    sentence,
    write_lines,
    write_sentencepiece,
)
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

import distill
import evaluate
import plain
import train_finetune
import train_pretrain
from common import UserError
from data import MAX_INPUT, Formatter, collate
from loading import build_distiller, load_checkpoint, load_llm, make_formatter
from model import head_logits, query_states, vector_prefix
from paper.demos import predict_each
from score import demo_tokens, option_scores
from serving.pretrained import Distiller
from serving.writer import Writer
from sources.template import TEMPLATES, chat_turns
from sources.text import Tokenizer

CPU = torch.device("cpu")
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
WITH_SYSTEM = "{{ '<|im_start|>system\nBe kind. ' + date_string + '<|im_end|>\n' }}" + CHATML
THOUGHT = "('<think>\n\n</think>\n\n' if m.role == 'assistant' else '') + m.content +"
THINKS = CHATML.replace("m.content +", THOUGHT)
INST = ("{{ '<s>' }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}")
GEMMA = ("{{ '<s>' }}{% for m in messages %}{{ '<|im_start|>' + m.role | replace('assistant', 'model')"
         " + '\n' + (m.content | trim) + '<|im_end|>\n' }}{% endfor %}")
SHOWN = [example("the river"), example("cold boat 12", "sad"), example("late ships, more rain"),
         example("bread", "happy")]


def give_chat(folder, template: str):
    """Add the two tokens that turns are marked with, and a chat template, to the tokenizer in a folder."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False)
                          for t in ("<|im_start|>", "<|im_end|>")], special_tokens=True)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder, len(tokenizer)


@pytest.fixture(params=[("bytes", CHATML), ("bytes", WITH_SYSTEM), ("bytes", THINKS), ("llama2", INST),
                        ("llama2", GEMMA), ("llama2", CHATML)],
                ids=["chatml", "system", "thinks", "inst", "gemma", "llama2-chatml"])
def talking(request, llama, tmp_path):
    """A tokenizer with a chat template: byte-level, or one that puts a space before a text."""
    kind, template = request.param
    folder = tmp_path / "talking"
    if kind == "bytes":
        shutil.copytree(llama, folder)
    else:
        rng = random.Random(3)
        write_sentencepiece(folder, kind, [sentence(rng, 50) + "\n[INST] user model" for _ in range(50)])
    return Tokenizer(str(give_chat(folder, template)[0]))


def own_ids(tokenizer: Tokenizer, asked: str, said: str | None = None) -> list[int]:
    """What the tokenizer's own apply_chat_template makes of a whole conversation, special tokens and all."""
    own = AutoTokenizer.from_pretrained(tokenizer.name)
    turns = [{"role": "user", "content": asked}] + ([{"role": "assistant", "content": said}] if said else [])
    return own.apply_chat_template(turns, return_dict=False, date_string="26 Jul 2024")


@pytest.mark.parametrize("n", [0, 1, 3])
def test_a_conversation_has_the_ids_of_apply_chat_template(talking, n):
    """[head ; D ; x and tail ; y] of `n` demonstrations in the user's turn; without any, x opens the turn."""
    enc = Formatter(talking, "chat", 900)
    query, joined = SHOWN[3], "".join(f"{e['input']}\n{e['output']}\n\n\n" for e in SHOWN[:n]) + "bread"
    D = enc.demonstrations(SHOWN[:n], 900) if n else []
    x, options = enc.scoring_query(query, first=not n)
    for option, y in zip(query["options"], options, strict=True):
        ids = enc.turns.head + D + x + y
        whole = own_ids(talking, joined, option)
        assert ids == whole[:len(ids)]
        assert talking.hf.decode(whole[len(ids):]).strip(" \n▁") in ("<|im_end|>", "</s>")  # its turn ends
    assert enc.training_query(query) == (enc.query(query), [enc.answer("happy")])
    assert D == whole[len(enc.turns.head):len(enc.turns.head) + len(D)]


def test_a_users_text_cannot_write_the_marks_of_turns(talking):
    enc = Formatter(talking, "chat", 900)
    marks = AutoTokenizer.from_pretrained(talking.name).convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    ids = enc.demonstrations([example("the <|im_end|> river <|im_start|>")], 900)
    assert not {*ids} & {*marks} and {*marks} & {*enc.turns.head, *enc.turns.tail} or "[INST]" in \
        talking.hf.chat_template


def test_lengths_leave_room_for_both_turns(talking):
    enc = Formatter(talking, "chat", 900, distill_len=8, llm_positions=600)
    fixed, longest = len(enc.turns.head + enc.turns.tail), max(len(enc.answer(y)) for y in ("happy", "sad"))
    assert fixed > 2 and enc.limit(SHOWN) == 600 - MAX_INPUT - longest - fixed
    long = example("boat " * 900)
    assert len(enc.query(long)) == MAX_INPUT + len(enc.turns.tail)
    assert enc.query(long)[MAX_INPUT:] == enc.turns.tail
    spoiled = enc.budget([long], 9)
    assert len(spoiled) == 9 and spoiled[-len(enc.label("happy")):] == enc.label("happy")
    assert not {*enc.turns.tail[:1]} & {*spoiled}


@pytest.mark.parametrize("template, said", [
    (None, "has no chat template; give an instruct model, put its template into a file chat_template.jinja"),
    ("{{ messages[0].content }}", "does not write a user's text and an answer once each"),
    ("{{ messages[1].content + messages[0].content }}", "does not write a user's text and an answer once"),
    ("{{ raise_exception('no assistant, please') }}", "does not run .*no assistant, please"),
    ("{{ messages[0].content | upper }}{{ messages[1].content }}", "other tokens than its parts")])
def test_what_is_no_chat_is_refused(llama, tmp_path, template, said):
    folder = shutil.copytree(llama, tmp_path / "llm")
    if template:
        give_chat(folder, template)
    with pytest.raises(UserError, match=f"--template chat.*{said}"):
        chat_turns(Tokenizer(str(folder)))


def test_other_templates_have_no_turns(tokenizer, word_tokenizer):
    for template, (before_answer, between) in TEMPLATES.items():
        if template != "chat":
            for own in (tokenizer, word_tokenizer):
                if "\n" in before_answer and own is word_tokenizer:
                    continue  # it drops newlines
                enc = Formatter(own, template, 900)
                assert (enc.turns.head, enc.turns.tail) == (own.bos, [])
                assert enc.query(example("a boat")) == own.encode(between + "a boat")


# What reads by it

@pytest.fixture(scope="module")
def chat_llm(llama, tmp_path_factory):
    """The folder of a tiny LLM with a chat template."""
    folder = shutil.copytree(llama, tmp_path_factory.mktemp("chat") / "tiny-chat")
    _, vocab = give_chat(folder, WITH_SYSTEM)
    llm = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    llm.resize_token_embeddings(vocab)
    llm.save_pretrained(folder)
    return folder


@pytest.fixture
def chat(chat_llm):
    llm, tokenizer = load_llm(str(chat_llm), CPU, torch.float32), Tokenizer(str(chat_llm))
    return SimpleNamespace(llm=llm, distiller=make_distiller(llm), tokenizer=tokenizer,
                           formatter=Formatter(tokenizer, "chat", 900, 4), args=SimpleNamespace(dtype="fp32"))


@pytest.mark.parametrize("method", ["zero_shot", "icl", "icl_budget", "last_l", "mend"])
@torch.no_grad()
def test_scores_are_those_of_a_plain_reading_of_the_conversation(chat, method):
    """Of each method, its part stands between the head and the query; for ICL the whole is the template's."""
    enc, first = chat.formatter, method == "zero_shot"
    if method == "icl_budget":
        enc.distill_len = 12
    queries, shown = SHOWN[2:], SHOWN[:2]
    D = demo_tokens(method, shown, 900, enc)
    middle = plain.Distiller.forward(chat.distiller, D) if method == "mend" else plain.embed(chat.llm, D)
    prefix = torch.cat([plain.embed(chat.llm, enc.turns.head), middle])
    rows = [{"queries": [enc.scoring_query(q, first) for q in queries]}]
    expected = plain_scores(chat.llm, rows, [prefix])[0]
    one = evaluate.one_prefix(method, shown, 900, chat.llm, chat.distiller, enc, chat.args)
    assert one.mask.shape[1] == len(prefix)
    found = option_scores(chat.llm, one, enc, queries, first)
    for row, right in zip(found, expected, strict=True):
        assert row.tolist() == pytest.approx(right, abs=1e-5)
    if method == "icl":
        joined = "".join(f"{e['input']}\n{e['output']}\n\n\n" for e in shown) + queries[1]["input"]
        for y, score in zip(queries[1]["options"], expected[1], strict=True):
            whole, n = own_ids(chat.tokenizer, joined, y), len(enc.answer(y))
            log_p = chat.llm(torch.tensor([whole])).logits[0].log_softmax(1)
            end = len(whole) - 2  # the template ends a turn with two tokens
            of_y = log_p[range(end - n - 1, end - 1), whole[end - n:end]]
            assert score == pytest.approx(of_y.mean().item())


@torch.no_grad()
def test_each_querys_own_demonstrations_stand_behind_the_head(chat):
    """Rows of different length, padded on the left: the padding stands before the head."""
    sets, queries = [SHOWN[:1], SHOWN[:3]], [SHOWN[3], example("boat", "sad")]
    for method in ("icl", "mend"):
        found = predict_each(method, sets, 900, chat.llm, chat.distiller, chat.formatter, queries, chat.args)
        for said, shown, query in zip(found, sets, queries, strict=True):
            one = evaluate.one_prefix(method, shown, 900, chat.llm, chat.distiller, chat.formatter, chat.args)
            assert [said] == evaluate.predict(chat.llm, one, chat.formatter, [query])


def test_keys_and_values_need_a_head_that_is_no_bos(chat, chat_llm, tmp_path):
    folder = shutil.copytree(chat_llm, tmp_path / "llm")
    give_chat(folder, "{% for m in messages %}{{ '<|im_start|>' + m.content }}{% endfor %}")
    args, made = SimpleNamespace(template="chat", context_len=900, distill_len=4), []
    for spec in ("layers:1", "kv:2"):
        made.append(build_distiller(spec, chat.llm, 4, "plain", 0))
        make_formatter(args, chat.tokenizer, chat.llm, made[-1])
    tokenizer = Tokenizer(str(folder))
    assert len(make_formatter(args, tokenizer, chat.llm, made[0]).turns.head) == 1
    with pytest.raises(UserError, match="starts with 1 tokens, and kv:R needs 2"):
        make_formatter(args, tokenizer, chat.llm, made[1])


@pytest.mark.parametrize("spec", ["layers:2", "kv:2"])
def test_both_stages_and_every_method_take_it(spec, chat_llm, chat, tasks_dir, corpus_dir, tmp_path,
                                              quick_dev, monkeypatch):
    """Pretraining text has no turns, and finetuning's rows have; a checkpoint keeps the template's name."""
    heads = {"pretrain": [], "finetune": []}
    for script in (train_pretrain, train_finetune):
        usual = script.teacher_and_student
        monkeypatch.setattr(script, "teacher_and_student", lambda *a, u=usual, s=script, **k: (
            heads[s.__name__.removeprefix("train_")].append((a[3], a[2])), u(*a, **k))[1])
    small = ["--preset", "pocket", "--llm", str(chat_llm), "--distiller", spec, "--distill-len", "4",
             "--tasks", str(tasks_dir), "--dtype", "fp32", "--device", "cpu", "--k", "4",
             "--template", "chat"]
    steps = ["--batch-size", "2", "--steps", "1", "--eval-every", "1"]
    pre, fine = tmp_path / "pre", tmp_path / "fine"
    train_pretrain.main([*small, *steps, "--corpus", str(corpus_dir), "--window", "96", "--eval-docs", "3",
                         "--out-dir", str(pre)])
    train_finetune.main([*small, *steps, "--queries-per-demo", "2", "--init-from", str(pre), "--out-dir",
                         str(fine)])
    assert load_checkpoint(fine)[1]["model"]["template"] == "chat"
    (bos, _), (head, batch) = heads["pretrain"][0], heads["finetune"][0]
    assert bos == [] and head == chat.formatter.turns.head
    tail, x = chat.formatter.turns.tail, batch["query_ids"][(batch["query"] == 0) & (batch["branch"] == 0)
                                                            & batch["query_mask"]]
    assert x[-len(tail):].tolist() == tail
    methods = ["zero_shot", "icl", "icl_budget", "last_l", "mend", "mend_swapped", "mend_permuted",
               "mend_constant", "majority"]
    names = [i for i, word in enumerate(small) if word == "--distiller"]
    flags = small[:names[0]] + small[names[0] + 2:]
    out = tmp_path / "results.jsonl"
    evaluate.main([*flags, "--checkpoint", str(fine), "--seeds", "13", "--limit", "4", "--methods", *methods,
                   "--out", str(out)])
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert {(r["method"], r["template"]) for r in records} == {(m, "chat") for m in methods}


@torch.no_grad()
def test_written_and_chosen_answers_behind_keys_and_values_in_a_chat(chat, chat_llm, tmp_path):
    """What is written, token by token after the cache, against scores of the same answer."""
    distiller = build_distiller("kv:2", chat.llm, 4, "plain", 0).eval()
    for p in distiller.parameters():
        p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    enc = chat.formatter
    D, head = enc.demonstrations(SHOWN, 900), enc.turns.head
    ids = torch.tensor([D])
    vectors = distiller(ids, torch.ones_like(ids, dtype=torch.bool), 1, head)
    query, written = example("the river is cold"), []
    prefix = vector_prefix(chat.llm, vectors, head)
    while len(written) < 4:
        batch = collate([{"demo": [], "queries": [(enc.query(query), [[*written, 0]])]}])
        states = query_states(chat.llm, prefix, batch)[0, -1:]
        written.append(head_logits(chat.llm, states).argmax().item())
        if written[-1] == chat.llm.config.eos_token_id:
            break
    expected = chat.tokenizer.hf.decode(written, skip_special_tokens=True).strip().split("\n")[0]
    found = Writer(chat.llm, enc, vectors[0]).write([query["input"]], max_new_tokens=4)
    assert found == [expected] and expected


@pytest.mark.parametrize("spec", ["layers:1", "kv:2"])
@torch.no_grad()
def test_a_distiller_as_an_object_makes_the_vectors_of_evaluate_in_a_chat(spec, chat, chat_llm, tmp_path):
    distiller = build_distiller(spec, chat.llm, 4, "plain", 0).eval()
    folder = save_distiller(tmp_path / "run", distiller, chat.llm, spec, "plain", trained_on={})
    _, saved = load_checkpoint(folder)
    saved["model"]["template"] = "chat"
    save_distiller(folder, distiller, chat.llm, spec, "plain", **saved)
    vectors = Distiller.from_pretrained(folder, llm=chat.llm).distill(str(chat_llm), SHOWN)
    found = vector_prefix(chat.llm, vectors[None], chat.formatter.turns.head)
    expected = evaluate.one_prefix("mend", SHOWN, 900, chat.llm, distiller, chat.formatter, chat.args)
    assert found.mask.shape[1] == 4 + len(chat.formatter.turns.head)
    for one, other in zip(found.keys_values, expected.keys_values, strict=True):
        for ours, theirs in zip(one, other, strict=True):
            torch.testing.assert_close(ours, theirs)


@torch.no_grad()
def test_distil_and_ask_in_a_chat(chat, chat_llm, tmp_path):
    """Chosen and written answers of distill.py, against a plain greedy loop after head, middle and query."""
    state = {"trained_on": {}, "step": 3, "metrics": {}, "commit": "abc", "flags": {}}
    folder = save_distiller(tmp_path / "run", chat.distiller, chat.llm, **state)
    _, saved = load_checkpoint(folder)
    saved["model"]["template"] = "chat"
    save_distiller(tmp_path / "run", chat.distiller, chat.llm, **saved)
    pairs = [("the boat", "green hills"), ("war", "trade and law"), ("bread", "music")]
    shown = write_lines(tmp_path / "demos.jsonl", [{"input": x, "output": y} for x, y in pairs])
    common = ["--llm", str(chat_llm), "--device", "cpu", "--dtype", "fp32", "--answer-tokens", "4", "--ask",
              "the river is cold"]
    out = str(tmp_path / "v.safetensors")
    found = distill.main(["--checkpoint", str(folder), "--demos", shown, "--out", out, *common])["answers"]
    enc = chat.formatter
    D = enc.demonstrations([example(x, y, ()) for x, y in pairs], 900)
    middles = {"zero_shot": plain.embed(chat.llm, []), "icl": plain.embed(chat.llm, D),
               "mend": plain.Distiller.forward(chat.distiller, D)}
    for way, middle in middles.items():
        x, written = enc.query(example("the river is cold"), first=way == "zero_shot"), []
        prefix = torch.cat([plain.embed(chat.llm, enc.turns.head), middle])
        while len(written) < 4:
            best = plain.read(chat.llm, prefix, x, [*written, 0])[-1].argmax().item()
            written.append(best)
            if best == chat.llm.config.eos_token_id:
                break
        said = chat.tokenizer.hf.decode(written, skip_special_tokens=True).strip().split("\n")[0]
        assert found[way] == [said]
    assert distill.main(["--vectors", out, *common])["answers"] == {"mend": found["mend"]}
