"""Tests of attention.py: the induction score on attention built by hand, an unpooled oracle, BOS, the whole
command."""

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import load, make_distiller, model_of, save_distiller
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from common import UserError
from data import Formatter
from paper import attention
from paper.attention import answer_attention, attend, induction_score, induction_scores, main, max_pool
from sources.text import Tokenizer

CPU = torch.device("cpu")


def copying(n: int, bos: int, shift: int) -> torch.Tensor:
    """Attention (1, T, T) of a head that looks `shift` back from the second copy, and else at itself."""
    T = 2 * n + bos
    weights = torch.eye(T)
    for t in range(n + bos, T):
        weights[t] = 0
        weights[t, t - shift] = 1
    return weights[None]


@pytest.mark.parametrize("bos", [0, 1])
def test_a_head_that_copies_scores_one_and_its_neighbours_zero(bos):
    n = 7
    heads = torch.cat([copying(n, bos, n - 1), copying(n, bos, n), copying(n, bos, n - 2),
                       copying(n, bos, 0)])
    assert induction_score(heads, n).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("bos", [0, 1])
def test_score_against_a_plain_loop(bos):
    n, rng = 6, torch.Generator().manual_seed(bos)
    weights = torch.rand(3, 2 * n + bos, 2 * n + bos, generator=rng)
    for head, score in enumerate(induction_score(weights, n).tolist()):
        assert score == pytest.approx(np.mean([weights[head, bos + n + i, bos + i + 1].item()
                                               for i in range(n)]))


def test_weights_are_those_of_transformers(llm, llm_folder):
    ids = torch.randint(llm.config.vocab_size, (1, 20), generator=torch.Generator().manual_seed(0))
    before = llm.config._attn_implementation
    ours = attend(llm, llm.get_input_embeddings()(ids), [], lambda w: w)
    assert llm.config._attn_implementation == before
    eager = AutoModelForCausalLM.from_pretrained(llm_folder, attn_implementation="eager").eval()
    with torch.no_grad():
        theirs = torch.cat(eager(ids, output_attentions=True).attentions)
    torch.testing.assert_close(ours, theirs)
    assert ours.std() > 0.05  # not all alike, or the comparison would show nothing
    assert not any(m._forward_hooks for m in llm.modules())


def test_an_llm_of_another_build_is_refused(llama):
    llm = load(llama)
    llm.base_model.layers[1].self_attn = torch.nn.Identity()
    with pytest.raises(UserError, match="has 2 modules named ...Attention in 3 layers"):
        attend(llm, torch.zeros(1, 3, 32), [], lambda w: w)


def test_bos_stands_first(llama_llm):
    llm = llama_llm
    embed, ids = llm.get_input_embeddings(), torch.tensor([[5, 9, 17]])
    with_head = attend(llm, embed(ids), [3], lambda w: w)
    torch.testing.assert_close(with_head, attend(llm, embed(torch.tensor([[3, 5, 9, 17]])), [], lambda w: w))


def test_an_induction_circuit_built_by_hand():
    """Two layers of attention on one-hot vectors [token | previous token | position]: the first layer's head
    looks one position back and writes the token there into the second slot; the second's looks for its own
    token in that slot."""
    n = 12
    width = 4 * n
    llm = GPT2LMHeadModel(GPT2Config(vocab_size=n, n_embd=width, n_layer=2, n_head=1, n_positions=2 * n,
                                     n_inner=4)).eval()
    token, previous, place = torch.arange(n), torch.arange(n, 2 * n), torch.arange(2 * n, 4 * n)
    one, two = (block.attn for block in llm.transformer.h)
    sharp = 50.0
    with torch.no_grad():
        for name, p in llm.named_parameters():
            p.fill_(1.0 if "ln_" in name and name.endswith("weight") else 0.0)
        llm.transformer.wte.weight[token, token] = 1
        llm.transformer.wpe.weight[torch.arange(2 * n), place] = 1
        one.c_attn.weight[place[1:], place[:-1]] = sharp                  # query: the position before mine
        one.c_attn.weight[place, width + place] = 1                       # key: my position
        one.c_attn.weight[token, 2 * width + token] = 1                   # value: my token
        one.c_proj.weight[token, previous] = 1
        two.c_attn.weight[token, token] = sharp                           # query: my token
        two.c_attn.weight[previous, width + token] = 1                    # key: the token before me
    rng = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(n, generator=rng) for _ in range(3)])
    looks_back, induces = induction_scores(llm, ids, None).flatten().tolist()
    # the first token has none before it and writes itself: where it comes again, it finds places 0 and 1
    # alike
    assert induces == pytest.approx((n - 0.5) / n, abs=1e-4) and looks_back == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("n", [1, 7, 19, 20, 21, 32, 40, 847])
def test_max_pool(n):
    weights = np.random.default_rng(n).random((4, n))
    pooled = max_pool(weights)
    assert pooled.shape == (4, min(n, 20))
    np.testing.assert_array_equal(pooled.max(axis=1), weights.max(axis=1))
    if n <= 20:
        np.testing.assert_array_equal(pooled, weights)
    if n % 20 == 0:
        np.testing.assert_array_equal(pooled, weights.reshape(4, 20, -1).max(axis=2))
    # the column that each of the n places falls into: in order, and runs equal to within one
    columns = [np.flatnonzero(max_pool(np.eye(n)[i:i + 1])[0]).tolist() for i in range(n)]
    assert all(len(c) == 1 for c in columns) and columns == sorted(columns)
    sizes = Counter(c for c, in columns).values()
    assert len(sizes) == min(n, 20) and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("head", [[], [3], [3, 11, 4]])
def test_answer_attention_is_the_last_query_tokens(llama, llama_llm, head):
    demo, query, heads = [7, 30, 2, 99, 41], [8, 14, 3], [(2, 1), (0, 3)]
    embedded = llama_llm.get_input_embeddings()(torch.tensor([demo]))
    found = answer_attention(llama_llm, embedded, query, heads, head)
    eager = AutoModelForCausalLM.from_pretrained(llama, attn_implementation="eager").eval()
    with torch.no_grad():
        weights = eager(torch.tensor([head + demo + query]), output_attentions=True).attentions
    rows = np.stack([weights[layer][0, h, -1, len(head):].numpy() for layer, h in heads])
    np.testing.assert_allclose(found["prefix"], rows[:, :5], atol=1e-6)
    np.testing.assert_allclose(found["query"], rows[:, 5:], atol=1e-6)


@pytest.fixture(scope="module")
def checkpoint(llm, llm_folder, tmp_path_factory):
    distiller, stages = make_distiller(llm, distill_len=24), {"pretrain": {"corpus": "text"}}
    path = save_distiller(tmp_path_factory.mktemp("run"), distiller, llm, step=7, trained_on=stages,
                          model=model_of(distiller, llm) | {"template": "newline"})  # as which it is read
    return SimpleNamespace(path=path, llm=llm_folder, distiller=distiller)


@pytest.fixture
def argv(llama, tasks_dir) -> list[str]:
    return ["--preset", "pocket", "--llm", str(llama), "--tasks", str(tasks_dir), "--dtype", "fp32",
            "--device", "cpu"]


def test_command(argv, checkpoint, tasks_dir, tiny_tasks, tmp_path, monkeypatch):
    monkeypatch.setattr(attention, "SEQUENCES", 2)
    monkeypatch.setattr(attention, "COPY_LEN", 30)
    out = main([*argv, "--llm", str(checkpoint.llm), "--checkpoint", str(checkpoint.path), "--task", "emo",
                "--example", "2", "--out", str(tmp_path)])
    induction, record = (json.loads((tmp_path / f"{name}.json").read_text())
                         for name in ("induction", "attention"))
    scores = np.array(induction["scores"])
    assert scores.shape == (3, 4) and 0 < scores.min() and scores.max() < 1
    order = [list(divmod(i, 4)) for i in np.argsort(-scores.flatten(), kind="stable")[:4]]
    assert induction["heads"] == record["heads"] == order == [[h["layer"], h["head"]] for h in out["heads"]]
    assert '--tasks "$METAICL_DIR"' in induction["command"] and str(tasks_dir) not in induction["command"]
    # the same from the pieces: what stands before the query, read by transformers itself
    tokenizer = Tokenizer(str(checkpoint.llm))
    formatter, files = Formatter(tokenizer, "newline", 900), tiny_tasks.files("emo", 100)
    demos, query = formatter.demonstrations(files["train"], 900), formatter.query(files["test"][2])
    assert (record["demo_tokens"], record["distill_len"], record["step"]) == (len(demos), 24, 7)
    assert "".join(record["query_tokens"]) == "".join(tokenizer.hf.decode(query).split())
    eager = AutoModelForCausalLM.from_pretrained(checkpoint.llm, attn_implementation="eager").eval()
    embed = eager.get_input_embeddings()
    with torch.no_grad():
        vectors = checkpoint.distiller(torch.tensor([demos]), torch.ones(1, len(demos), dtype=torch.bool))
        for method, prefix in (("icl", embed(torch.tensor([demos]))), ("mend", vectors)):
            embeds = torch.cat([prefix, embed(torch.tensor([query]))], dim=1)
            weights = eager(inputs_embeds=embeds, output_attentions=True).attentions
            rows = np.stack([weights[layer][0, h, -1].numpy() for layer, h in order])
            np.testing.assert_allclose(record[method]["query"], rows[:, prefix.shape[1]:], atol=1e-4)
            np.testing.assert_allclose(record[method]["prefix"], max_pool(rows[:, :prefix.shape[1]]),
                                       atol=1e-4)
            assert len(record[method]["prefix"][0]) == 20


def test_without_a_checkpoint_only_the_scores(argv, tmp_path, monkeypatch):
    monkeypatch.setattr(attention, "COPY_LEN", 30)
    out = main([*argv, "--out", str(tmp_path)])
    assert out["files"] == [str(tmp_path / "induction.json")] and not (tmp_path / "attention.json").exists()


@pytest.mark.parametrize(("more", "message"), [
    (["--task", "emoo"], "emoo is no meta-test task"), (["--example", "24"], "emo has 0 to 23"),
    (["--context-len", "0"], "--context-len is 0"), (["--seed", "3"], "--seed 3: MetaICL's are"),
    (["--k", "17"], "emo has 16 training examples for seed 100, and --k is 17"),
    (["--out", __file__], "stands under a file")])
def test_faulty_flags(argv, checkpoint, tmp_path, monkeypatch, more, message):
    monkeypatch.setattr(attention, "COPY_LEN", 30)
    with pytest.raises(UserError, match=message):
        main([*argv, "--llm", str(checkpoint.llm), "--checkpoint", str(checkpoint.path), "--task", "emo",
              "--out", str(tmp_path), *more])


def test_an_llm_with_too_few_positions(gpt2, argv, tmp_path):
    with pytest.raises(UserError, match="reads 640 tokens, and the induction test needs 1000"):
        main([*argv, "--llm", str(gpt2), "--out", str(tmp_path)])
