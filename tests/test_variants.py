"""Distillers that hand over keys and values. The oracle is one forward pass of the LLM over [D ; D's last
tokens ; query], whose mask hides from the query all of D but its first token."""

import json

import pytest
import torch
import transformers as hf

import distill
import evaluate
import train_finetune
import train_pretrain
from common import UserError
from data import Formatter, collate
from loading import build_distiller, check_llm, load_checkpoint, load_llm
from model import head_logits, loss_mask, query_states, teacher_and_student, vector_prefix
from score import distill_loss
from serving.writer import Writer
from sources.text import Tokenizer
from variants import Adapter, KeyValueDistiller

CPU, L, RANK = torch.device("cpu"), 4, 3
SPECIAL = {"vocab_size": 320, "bos_token_id": 1, "eos_token_id": 2}
D, QUERIES = list(range(5, 16)), [([40, 41, 42], [[50, 51], [52]]), ([43, 44], [[53, 54, 55], [56]])]
KV = ["--distiller", f"kv:{RANK}", "--init-from", "none", "--steps", "4", "--eval-every", "4", "--k", "4",
      "--batch-size", "2", "--queries-per-demo", "2", "--context-len", "300"]


@pytest.fixture(scope="module")
def llm(llm_folder):
    return load_llm(str(llm_folder), CPU, torch.float32)


@pytest.fixture
def distiller(llm) -> KeyValueDistiller:
    return build_distiller(f"kv:{RANK}", llm, L, "residual", seed=0)


def trained(distiller: KeyValueDistiller) -> KeyValueDistiller:
    """With adapters and placeholders as training might leave them."""
    generator = torch.Generator().manual_seed(1)
    for p in distiller.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return distiller


def read(llm, distiller, rows: list[dict]) -> tuple[torch.Tensor, dict]:
    batch = collate(rows)
    with torch.no_grad():
        vectors = distiller(batch["demo_ids"], batch["demo_mask"])
        return head_logits(llm, query_states(llm, vector_prefix(llm, vectors), batch)), batch


def by_hand(llm, demo: list[int], x: list[int], y: list[int]) -> torch.Tensor:
    """Logits of x and y: the LLM's own forward over all tokens at once."""
    again, query, T = demo[-(L - 1):], x + y, len(demo)
    ids = torch.tensor([demo + again + query])
    n, first = ids.shape[1], T + L - 1
    allowed = torch.ones(n, n, dtype=torch.bool).tril()
    allowed[first:, 1:T] = False
    mask = torch.zeros(n, n).masked_fill(~allowed, torch.finfo(torch.float32).min)[None, None]
    positions = torch.arange(n)
    if llm.config.model_type == "gpt2":  # learned positions: the query stands at l
        positions[first:] = torch.arange(L, L + len(query))
    with torch.no_grad():
        return llm(input_ids=ids, attention_mask=mask, position_ids=positions[None]).logits[0, first - 1:-1]


def random_llm(config):
    config.initializer_range = 0.2
    torch.manual_seed(0)
    llm = hf.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    check_llm(llm, "tiny")
    return llm


def test_falcon_whose_configuration_does_not_name_its_one_key_head():
    llm = random_llm(hf.FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                     multi_query=True, new_decoder_architecture=False, **SPECIAL))
    distiller = build_distiller(f"kv:{RANK}", llm, L, "residual", seed=0)
    test_untrained_the_query_reads_the_last_tokens_read_twice(llm, distiller)


def test_gpt_j_which_has_a_table_of_places_is_refused():
    llm = random_llm(hf.GPTJConfig(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=128, **SPECIAL))
    with pytest.raises(UserError, match="kv:3 moves the places of keys, and an LLM of type gptj has a table"):
        build_distiller(f"kv:{RANK}", llm, L, "residual", seed=0)


def test_untrained_the_query_reads_the_last_tokens_read_twice(llm, distiller):
    logits, batch = read(llm, distiller, [{"demo": D, "queries": QUERIES}])
    for s, (x, options) in enumerate(QUERIES):
        for o, y in enumerate(options):
            at = (batch["query"][0] == s) & ((batch["branch"][0] == 0) | (batch["branch"][0] == o + 1))
            found = logits[0][at & batch["query_mask"][0]]
            torch.testing.assert_close(found, by_hand(llm, D, x, y), atol=2e-4, rtol=1e-3)


def test_a_chats_head_stands_before_keys_and_values_that_know_nothing_of_it(llm, distiller):
    """By hand: the query sees head, D's first token and the last ones read twice; these see D alone, and
    stand after the head's positions. A single BOS has D's first token in its place, as ever."""
    head, rows = [3, 99, 41, 7], [{"demo": D, "queries": QUERIES}, {"demo": [*range(100, 120), *D],
                                                                   "queries": QUERIES}]
    (x, (y, *_)), h, T, batch = QUERIES[0], len(head), len(D), collate(rows)
    with torch.no_grad():
        def logits_behind(head):
            vectors = distiller(batch["demo_ids"], batch["demo_mask"], 1, head)
            return head_logits(llm, query_states(llm, vector_prefix(llm, vectors, head), batch))

        found, bos, none = logits_behind(head), logits_behind([3]), logits_behind([])
        ids = torch.tensor([head + D + D[-(L - 1):] + x + y])
        n, first = ids.shape[1], h + T + L - 1
        allowed = torch.ones(n, n, dtype=torch.bool).tril()
        allowed[h:first, :h] = False
        allowed[first:, h + 1:h + T] = False
        learned = llm.config.model_type == "gpt2"
        start = h if learned else h + 1 - T
        positions = torch.cat([torch.arange(h), start + torch.arange(T + L - 1),
                               h + L + torch.arange(n - first)])[None]
        mask = torch.zeros(n, n).masked_fill(~allowed, torch.finfo(torch.float32).min)[None, None]
        expected = llm(input_ids=ids, attention_mask=mask, position_ids=positions).logits[0, first - 1:-1]
    at = (batch["query"][0] == 0) & (batch["branch"][0] <= 1) & batch["query_mask"][0]
    torch.testing.assert_close(found[0][at], expected, atol=2e-4, rtol=1e-3)
    assert torch.equal(bos, none) and (found - none)[batch["query_mask"]].abs().max() > 0.01


def test_the_vectors_depend_on_all_demonstrations_and_not_on_padding(llm, distiller):
    trained(distiller)
    rows = [{"demo": D, "queries": QUERIES}, {"demo": [*range(100, 120), *D], "queries": QUERIES}]
    together, _ = read(llm, distiller, rows)
    alone, _ = read(llm, distiller, rows[:1])
    torch.testing.assert_close(together[0], alone[0], atol=2e-4, rtol=1e-3)
    assert (together[0] - together[1]).abs().max() > 0.01  # what stands before the same last tokens counts


def test_demonstrations_shorter_than_the_vectors_are_read(llm, distiller):
    logits, _ = read(llm, distiller, [{"demo": D[:2], "queries": QUERIES}, {"demo": D, "queries": QUERIES}])
    alone, _ = read(llm, distiller, [{"demo": D[:2], "queries": QUERIES}])
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[0], alone[0], atol=2e-4, rtol=1e-3)


def test_only_adapters_and_placeholders_are_trained_and_saved(llm, distiller):
    before = [p.clone() for p in llm.parameters()]
    assert {name.rsplit(".", 1)[-1] for name in distiller.state_dict()} == {"A", "B", "placeholders"}
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
    batch = collate([{"demo": D, "queries": [(x, options[:1]) for x, options in QUERIES]}])
    for _ in range(2):
        teacher, student = teacher_and_student(llm, distiller, batch, [], "fp32")
        mask = loss_mask(llm, batch)
        (head_logits(llm, student[mask]) - head_logits(llm, teacher[mask])).pow(2).mean().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in distiller.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, llm.parameters(), strict=True))


def test_an_adapter_adds_its_scaled_product():
    layer = torch.nn.Linear(5, 7)
    adapter = Adapter(layer, 2, torch.Generator().manual_seed(0))
    x = torch.randn(3, 5)
    assert torch.equal(adapter(x), layer(x))
    adapter.B.data.normal_()
    expected = x @ (layer.weight + 2 * adapter.B @ adapter.A).T + layer.bias
    torch.testing.assert_close(adapter(x), expected)


def test_training_resumes_and_all_commands_take_the_checkpoint(flags, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train_finetune.main([*flags, *KV, "--out-dir", str(whole)])

    class Stop(Exception):
        pass

    def stop(run, *_):
        if run.step == 2:
            raise Stop
        return begin(run)

    begin = train_finetune.Run.begin_step
    monkeypatch.setattr(train_finetune.Run, "begin_step", stop)
    with pytest.raises(Stop):
        train_finetune.main([*flags, *KV, "--out-dir", str(cut), "--save-every", "1"])
    monkeypatch.undo()
    train_finetune.main([*flags, *KV, "--out-dir", str(cut), "--resume"])
    weights = [load_checkpoint(folder / "last.safetensors")[0] for folder in (whole, cut)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    at = flags.index("--distiller")
    flags = flags[:at] + flags[at + 4:]
    methods, results = ["last_l", "mend", "mend_swapped", "mend_constant"], tmp_path / "results.jsonl"
    evaluate.main([*flags, "--checkpoint", str(whole), "--seeds", "100", "--limit", "4", "--k", "4",
                   "--methods", *methods, "--out", str(results)])
    assert {json.loads(line)["method"] for line in results.read_text().splitlines()} == {*methods}
    lines = [{"input": f"{word} river", "output": word} for word in ("cold", "small", "green")]
    (tmp_path / "demos.jsonl").write_text("\n".join(map(json.dumps, lines)))
    llm = flags[flags.index("--llm") + 1]
    asked = ["--llm", llm, "--device", "cpu", "--answer-tokens", "3", "--ask", "music river", "war boat"]
    kept = str(tmp_path / "v.safetensors")
    demos = str(tmp_path / "demos.jsonl")
    own = distill.main(["--checkpoint", str(whole), "--demos", demos, "--out", kept, *asked])
    again = distill.main(["--vectors", kept, *asked])
    assert own["answers"]["mend"] == again["answers"]["mend"]


def test_elastic_training_makes_a_checkpoint_for_shorter_l(flags, tmp_path, monkeypatch):
    seen, fixed, out = [], tmp_path / "fixed", ["--out", str(tmp_path / "results.jsonl")]
    forward = KeyValueDistiller.forward
    monkeypatch.setattr(KeyValueDistiller, "forward", lambda self, *batch: (
        seen.append(batch[4].sum(dim=1).tolist() if batch[4:] and batch[4] is not None else
                    torch.is_grad_enabled()), forward(self, *batch))[1])
    train_finetune.main([*flags, *KV, "--batch-size", "4", "--distill-len", "9", "--elastic", "--out-dir",
                         str(tmp_path)])
    trained = [lengths for lengths in seen if isinstance(lengths, list)]
    assert len(trained) == 4 and {8, 9} == set(sum(trained, []))
    assert sum(len({*row}) == 2 for row in trained) > 2
    assert False in seen and True not in seen  # evaluations have the whole l, and nothing else
    train_finetune.main([*flags, *KV, "--distill-len", "9", "--out-dir", str(fixed), "--steps", "1"])
    at = flags.index("--distiller")
    flags = [*flags[:at], *flags[at + 4:], "--seeds", "100", "--limit", "2", "--k", "4", "--methods", "mend"]
    evaluate.main([*flags, "--checkpoint", str(tmp_path), "--distill-len", "5", *out])
    evaluate.main([*flags, "--checkpoint", str(tmp_path), *out])
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {r["distill_len"] for r in lines} == {5, 9}
    for folder, length, fault in ((fixed, "5", "was trained for 9 vectors"),
                                  (tmp_path, "1", "makes 2 or more"),
                                  (tmp_path, "10", "has 9 placeholders")):
        with pytest.raises(UserError, match=fault):
            evaluate.main([*flags, "--checkpoint", str(folder), "--distill-len", length, *out])


def test_an_answer_is_written_as_the_oracle_would(llm, llm_folder, distiller):
    formatter = Formatter(Tokenizer(str(llm_folder)), "space", context_len=100)
    with torch.no_grad():
        vectors = distiller(torch.tensor([D]), torch.ones(1, len(D), dtype=torch.bool))[0]
    query = {"input": "music and war", "output": "", "options": []}
    x, written = formatter.query(query), []
    for _ in range(4):
        written.append(int(by_hand(llm, D, x, [*written, 0])[-1].argmax()))
        # by_hand's last row predicts the token after all but the last, which is a stand-in
    expected = formatter.tokenizer.hf.decode(written, skip_special_tokens=True).strip().split("\n")[0]
    assert Writer(llm, formatter, vectors).write([query["input"]], max_new_tokens=4) == [expected]


def test_it_learns_what_the_hidden_demonstrations_say(llm, distiller):
    optimizer = torch.optim.Adam(distiller.parameters(), lr=0.01)
    batch, losses = collate([{"demo": D, "queries": [(x, options[:1]) for x, options in QUERIES]}]), []
    for _ in range(40):
        teacher, student = teacher_and_student(llm, distiller, batch, [], "fp32")
        mask = loss_mask(llm, batch)
        losses.append(loss := distill_loss(llm, student[mask], teacher[mask]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]


def test_pretraining_runs_on_text(flags, corpus_dir, tmp_path):
    figures = train_pretrain.main([*flags, "--distiller", f"kv:{RANK}", "--corpus", str(corpus_dir),
                                   "--steps", "2", "--eval-docs", "3", "--window", "32", "--k", "4",
                                   "--min-doc-len", "32", "--batch-size", "2", "--out-dir", str(tmp_path)])
    assert figures["steps"] == 2 and 0 < figures["heldout_kl"] < figures["heldout_kl_no_context"]


@pytest.mark.parametrize("spec, length, fault", [("kv:0", 4, "adapters' rank"), ("kv:x", 4, "adapters' rank"),
                                                ("kv:33", 4, "from 1 to the LLM's width 32"),
                                                 ("kv:2", 1, "give 2 or more")])
def test_what_cannot_be_built_is_refused(llm, spec, length, fault):
    with pytest.raises(UserError, match=fault):
        build_distiller(spec, llm, length, "residual", seed=0)
