"""Tests of serving/pretrained.py with the real huggingface_hub: folders, the hub's cache, refusals."""

import json

import pytest
import safetensors.torch
import torch
from conftest import example, load, make_distiller, save_distiller
from huggingface_hub import HfApi, ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import distill
from data import Formatter
from loading import build_distiller, checkpoint_id, load_checkpoint, load_distiller
from score import distil
from serving.pretrained import Distiller
from sources.text import Tokenizer

EXAMPLES = [{"input": "the boat is green", "output": "happy"}, {"input": "war and trade", "output": "sad"}]
STATE = {"trained_on": {"finetune": {"tasks": "functions", "split": "x", "lam": 1}}, "step": 3,
         "metrics": {"dev_ce": 0.5}, "commit": "abc", "flags": {"out_dir": "/home/me/run", "lr": 0.1}}


def trained(llm, spec: str, start: str = "matched"):
    """A distiller of weights that building it does not give, and that bf16 cannot hold."""
    module = build_distiller(spec, llm, 4, start, 1).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in module.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator)
    return module


@pytest.fixture(params=["layers:2", "kv:3", "free"])
def spec(request) -> str:
    return request.param


@pytest.fixture
def module(llm, spec):
    return trained(llm, spec, "residual")


@pytest.fixture
def run_folder(llm, spec, module, tmp_path):
    return save_distiller(tmp_path / "run", module, llm, spec, "residual", **STATE)


def vectors_by_hand(module, name: str) -> torch.Tensor:
    formatter = Formatter(Tokenizer(name), "space", 900)
    return distil(formatter.parts([example(e["input"], e["output"]) for e in EXAMPLES], 900), module,
                  torch.device("cpu"), "fp32", [])[0].float()


def test_a_folder_holds_all_of_a_distiller(llm, llm_folder, module, run_folder, tmp_path):
    expected = vectors_by_hand(module, str(llm_folder))
    tokenizer, folder = AutoTokenizer.from_pretrained(llm_folder), tmp_path / "mine"
    first = Distiller.from_pretrained(run_folder, llm=llm)
    first.save_pretrained(folder)
    again = Distiller.from_pretrained(folder, llm=llm)
    for distiller in (first, again):
        assert torch.equal(distiller.distill(tokenizer, EXAMPLES), expected)  # fp32 stays fp32
        assert torch.equal(distiller.distill(str(llm_folder), EXAMPLES), expected)
    assert again.state["model"] == first.state["model"] and again.state["metrics"] == STATE["metrics"]
    assert again.state["flags"] == {"lr": 0.1}
    found, state = load_distiller(folder, llm)  # what every script calls
    assert torch.equal(vectors_by_hand(found.eval(), str(llm_folder)), expected)
    assert checkpoint_id(folder).startswith("mine/model@") and state["commit"] == "abc"


def test_weights_of_bf16_stay_small_and_the_same(llm, run_folder, tmp_path):
    distill.main(["--checkpoint", str(run_folder), "--publish", str(tmp_path / "a")])
    Distiller.from_pretrained(tmp_path / "a", llm=llm).save_pretrained(tmp_path / "b")
    (first, _), (second, _) = (load_checkpoint(tmp_path / name) for name in "ab")
    assert {t.dtype for t in second.values()} == {torch.bfloat16} and first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_card_and_the_configuration_say_what_it_is(llm, run_folder, tmp_path):
    folder = tmp_path / "mine"
    distiller = Distiller.from_pretrained(run_folder, llm=llm)
    distiller.save_pretrained(folder)
    card = ModelCard.load(folder / "README.md")
    name, hashes = distiller.state["model"]["llm"]["name"], distiller.state["model"]["llm"]["weights_hash"]
    assert "mend" in card.data.tags and card.data.library_name == "mend"
    for said in (f"4 vectors in place of demonstrations, for {name}", f"| LLM, weights_hash | {hashes} |",
                 f"`{distiller.state['model']['distiller']}`", "| dev_ce | 0.5 |", "tasks functions",
                 "| step, commit | 3, abc |"):
        assert said in card.text, said
    assert "{{" not in card.text and "{%" not in card.text and str(tmp_path) not in card.text
    assert json.loads((folder / "config.json").read_text()) == Distiller.from_pretrained(folder).state
    distiller.llm, before = load(llm.config._name_or_path), distiller.generate_model_card()
    distiller.llm.config._name_or_path = "someone/llm"  # a name on the hub, and no folder
    after = distiller.generate_model_card()
    assert before.data.base_model is None and after.data.base_model == "someone/llm"
    assert 'from_pretrained("someone/llm")' in after.text and f'from_pretrained("{name}")' in before.text
    (folder / "README.md").write_text("mine")
    distiller.save_pretrained(folder)
    assert (folder / "README.md").read_text() == "mine"


def test_five_lines_with_transformers_own_loading(llama, tmp_path, monkeypatch):
    llm = load(llama)
    save_distiller(tmp_path / "run", trained(llm, "layers:2"), llm, **STATE)
    expected = vectors_by_hand(load_distiller(tmp_path / "run", llm)[0].eval(), str(llama))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        mine, tokenizer = (kind.from_pretrained(llama, **more) for kind, more in (
            (AutoModelForCausalLM, {"dtype": dtype}), (AutoTokenizer, {})))
        before = tokenizer("<|endoftext|> a").input_ids
        vectors = Distiller.from_pretrained(tmp_path / "run", llm=mine).distill(tokenizer, EXAMPLES)
        assert vectors.dtype == torch.float32
        assert (vectors - expected).norm() < tolerance * expected.norm()
        assert tokenizer("<|endoftext|> a").input_ids == before  # the caller's tokenizer is as it was


def test_template_and_elastic_length_travel(llama, llama_llm, tmp_path):
    module = trained(llama_llm, "layers:2")
    folder = save_distiller(tmp_path / "run", module, llama_llm, **STATE)
    tensors, state = load_checkpoint(folder)
    state["model"] |= {"template": "newline", "elastic": True}
    Distiller(tensors, state).save_pretrained(tmp_path / "mine")
    distiller = Distiller.from_pretrained(tmp_path / "mine", llm=llama_llm)
    formatter = Formatter(Tokenizer(str(llama)), "newline", 900)
    parts = formatter.parts([example(e["input"], e["output"]) for e in EXAMPLES], 900)
    for length in (2, 4, 3):  # longer again after shorter
        module.distill_len = length
        expected = distil(parts, module, torch.device("cpu"), "fp32", [])[0]
        torch.testing.assert_close(distiller.distill(str(llama), EXAMPLES, length), expected)
    assert len(distiller.distill(str(llama), EXAMPLES)) == 4
    with pytest.raises(common.UserError, match="has 4 placeholders"):
        distiller.distill(str(llama), EXAMPLES, 5)
    for wrong, message in (({"distill_len": 0}, "makes 1 or more"), ({"context_len": 0}, "1 or more as"),
                           ({"segments": 0}, "1 or more as"), ({"segments": 3}, "segments of up to")):
        with pytest.raises(common.UserError, match=message):
            distiller.distill(str(llama), EXAMPLES, **wrong)
    two = distiller.distill(str(llama), EXAMPLES, segments=2)
    each = [distiller.distill(str(llama), [e]) for e in EXAMPLES]
    assert torch.equal(two[:4], each[0]) and two.shape == (8, 32)


def test_a_name_on_the_hub_is_read_from_its_cache(llama, llama_llm, tmp_path):
    folder = save_distiller(tmp_path / "run", trained(llama_llm, "layers:2"), llama_llm, **STATE)
    there, revision = tmp_path / "hub" / "models--me--mine", "a" * 40
    Distiller.from_pretrained(folder, llm=llama_llm).save_pretrained(there / "snapshots" / revision)
    (there / "refs").mkdir()
    (there / "refs" / "main").write_text(revision)
    found = Distiller.from_pretrained("me/mine", llm=llama_llm, cache_dir=tmp_path / "hub")
    expected = Distiller.from_pretrained(folder, llm=llama_llm).distill(str(llama), EXAMPLES)
    assert torch.equal(found.distill(str(llama), EXAMPLES), expected)
    with pytest.raises(common.UserError, match="me/other is no file or folder, and cannot be had"):
        Distiller.from_pretrained("me/other", llm=llama_llm, cache_dir=tmp_path / "hub")


def test_push_to_hub_hands_the_three_files_to_the_hub(llama_llm, tmp_path, monkeypatch):
    pushed = {}

    def upload_folder(self, *, folder_path, **more):
        pushed.update({path.name: path.read_bytes() for path in folder_path.iterdir()}, asked=more["repo_id"])
        return "address"

    class Repository:
        repo_id = "me/mine"

    monkeypatch.setattr(HfApi, "create_repo", lambda self, **_: Repository)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    folder = save_distiller(tmp_path / "run", trained(llama_llm, "layers:2"), llama_llm, **STATE)
    distiller = Distiller.from_pretrained(folder)  # no LLM is needed for this
    assert distiller.push_to_hub("me/mine") == "address"
    assert pushed.pop("asked") == "me/mine"
    distiller.save_pretrained(tmp_path / "mine")
    kept = {path.name: path.read_bytes() for path in (tmp_path / "mine").iterdir()}
    assert pushed.keys() == kept.keys() == {"README.md", "config.json", "model.safetensors"}
    found, expected = (safetensors.torch.load(files.pop("model.safetensors")) for files in (pushed, kept))
    assert pushed == kept and all(torch.equal(found[name], expected[name]) for name in found | expected)


def test_what_does_not_belong_together_is_refused(gpt2, llama, llama_llm, word_tokenizer, tmp_path):
    folder = save_distiller(tmp_path / "run", make_distiller(llama_llm), llama_llm, **STATE)
    with pytest.raises(common.UserError, match="was trained for the LLM"):
        Distiller.from_pretrained(folder, llm=load(gpt2))
    distiller = Distiller.from_pretrained(folder, llm=llama_llm)
    for wrong, message in (((word_tokenizer.hf, EXAMPLES), "with a tokenizer of hash"),
                           ((str(llama), []), "no example is given"),
                           ((str(llama), [{"input": "a"}]), "needs texts as input and output"),
                           ((str(llama), EXAMPLES, 3), "train with --elastic")):
        with pytest.raises(common.UserError, match=message):
            distiller.distill(*wrong)
    with pytest.raises(common.UserError, match="was loaded without its LLM"):
        Distiller.from_pretrained(folder).distill(str(llama), EXAMPLES)
    with pytest.raises(common.UserError, match="is not a whole checkpoint"):
        Distiller.from_pretrained(llama)
    bare = Distiller.from_pretrained(save_distiller(tmp_path / "bare", make_distiller(llama_llm), llama_llm))
    with pytest.raises(common.UserError, match="bare is not a whole checkpoint"):
        bare.save_pretrained(tmp_path / "mine")
