"""Tests of pairs.py: the distiller of an LLM is chosen, or refused, before any corpus or task is read."""

import shutil
from types import SimpleNamespace

import pytest
from transformers import LlamaConfig

import common
import train_finetune
import train_pretrain
from common import UserError
from sources import pairs
from sources.pairs import SIBLINGS, settle_distiller


def settled(llm: str, distiller: str = "gpt2", given: bool = False, template: str = "space") -> str:
    args = SimpleNamespace(llm=llm, distiller=distiller, template=template,
                           filled_in=[] if given else ["distiller"])
    settle_distiller(args)
    return args.distiller


def write_config(folder, layers: int) -> str:
    LlamaConfig(num_hidden_layers=layers, hidden_size=32, num_attention_heads=4).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 16, 22, 28, 32, 80])
def test_an_llm_of_unknown_siblings_lends_a_quarter_to_a_half_of_its_layers(tmp_path, layers, capsys):
    spec = settled(write_config(tmp_path / "Llama-X", layers))
    n = int(spec.removeprefix("layers:"))
    assert spec == f"layers:{n}" and (layers / 4 <= n <= layers / 2 or n == layers == 1)
    said = capsys.readouterr().out
    assert f"with the tokenizer of Llama-X is known here: distiller {spec}, of the LLM's own {layers}" in said
    assert "--distiller" in said


@pytest.mark.parametrize("name, sibling", [
    ("gpt2-large", "gpt2"), ("gpt2-xl", "gpt2"), ("opt-6.7b", "facebook/opt-125m"),
    ("t5-large-lm-adapt", "google/t5-small-lm-adapt"), ("flan-t5-xl", "google/flan-t5-base")])
def test_the_papers_llms_keep_the_papers_distillers(tmp_path, name, sibling, monkeypatch, capsys):
    """Those of bench.py --plan, Tab. 2 and Tab. 6."""
    asked = []
    monkeypatch.setattr(pairs, "require_model", lambda *a: asked.append(a))
    monkeypatch.setattr(pairs, "check_same_tokens", lambda *a: asked.append(a))
    llm = write_config(tmp_path / name, 12)
    assert settled(llm) == sibling
    assert asked == [("--llm", llm), ("--distiller", sibling), (sibling, llm)]
    assert not capsys.readouterr().out


def test_names_that_only_look_like_the_papers_have_no_sibling(tmp_path):
    for name in ("gpt2-large-chinese", "my-opt-1", "t5-large", "Llama-3.2-1B"):
        assert settled(write_config(tmp_path / name, 8)) == "layers:3"
    assert set(SIBLINGS.values()) == {"gpt2", "facebook/opt-125m", "google/t5-small-lm-adapt",
                                      "google/flan-t5-base"}


def test_what_was_given_stays_and_is_checked(tmp_path, llama, capsys):
    llm = write_config(tmp_path / "Llama-X", 8)
    assert [settled(llm, spec, given=True) for spec in ("layers:8", "kv:4", "free")] == \
        ["layers:8", "kv:4", "free"]
    assert settled(llm, "layers:6") == "layers:6"  # the pocket preset's
    for spec in ("layers:9", "layers:0", "layers:x"):
        with pytest.raises(UserError, match="this LLM has 8 layers: give layers:1 to layers:8"):
            settled(llm, spec, given=True)
    assert settled(str(llama), str(shutil.copytree(llama, tmp_path / "same")), given=True)
    (tmp_path / "elsewhere").mkdir()
    for missing in (str(tmp_path / "nothing"), str(tmp_path / "elsewhere")):
        with pytest.raises(UserError, match="--distiller"):
            settled(str(llama), missing, given=True)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("script", [train_pretrain, train_finetune], ids=lambda s: s.__name__)
@pytest.mark.parametrize("more, said", [
    (["--distiller", "layers:9"], "this LLM has 3 layers"),
    (["--distiller", "OTHER"], "--distiller .*other does not share the tokenizer"),
    (["--template", "chat"], "has no chat template")])
def test_no_corpus_and_no_task_is_read_before_the_pair_is_refused(script, more, said, llama, tmp_path,
                                                                  monkeypatch):
    if "OTHER" in more:
        folder = tmp_path / "other"
        shutil.copytree(llama, folder)
        path = folder / "tokenizer.json"
        text = path.read_text()
        vocab = text.index('"vocab"')
        swapped = text[vocab:].replace('"!": 1,', '"!": 2,').replace('"\\"": 2,', '"\\"": 1,')
        path.write_text(text[:vocab] + swapped)
        assert path.read_text() != text
        more = ["--distiller", str(folder)]

    def read(*_, **__):
        raise AssertionError("read too early")

    for name in ("tasks_of", "load_llm_of", *(["Corpus"] if script is train_pretrain else [])):
        monkeypatch.setattr(script, name, read)
    with pytest.raises(UserError, match=said):
        script.main(["--preset", "paper", "--llm", str(llama), "--device", "cpu", *more])


def test_both_stages_of_the_paper_preset_take_any_llm(llama, tasks_dir, corpus_dir, tmp_path, quick_dev,
                                                      capsys):
    """--preset paper --llm NAME, without --distiller: one of three layers, and the stages agree."""
    small = ["--preset", "paper", "--llm", str(llama), "--tasks", str(tasks_dir), "--distill-len", "4",
             "--k", "2", "--steps", "1", "--eval-every", "1", "--batch-size", "1", "--device", "cpu",
             "--dtype", "fp32"]
    pre = tmp_path / "pre"
    train_pretrain.main([*small, "--corpus", str(corpus_dir), "--window", "64", "--min-doc-len", "30",
                         "--eval-docs", "2", "--out-dir", str(pre)])
    train_finetune.main([*small, "--init-from", str(pre), "--out-dir", str(tmp_path / "fine")])
    assert capsys.readouterr().out.count("distiller layers:1, of the LLM's own 3 layers") == 2
    assert common.PRESETS["paper"]["distiller"] == "gpt2"


def test_pockets_own_layers_become_fewer_for_a_small_llm(tmp_path, capsys):
    small, large = (write_config(tmp_path / f"mine-{n}", n) for n in (3, 12))
    assert settled(small, "layers:6") == "layers:1" and settled(large, "layers:6") == "layers:6"
    assert "mine-3 has 3 layers: distiller layers:1; change it with --distiller" in capsys.readouterr().out
    with pytest.raises(UserError, match="give layers:1 to layers:3"):
        settled(small, "layers:6", given=True)
