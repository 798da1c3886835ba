"""Tests of distill.py: answers against plain forward passes of the LLM, files, errors; and the published
checkpoint."""

import ast
import json
import re
import runpy
import shlex

import pytest
import torch
from conftest import example, load, make_distiller, save_distiller, write_lines
from safetensors.torch import load_file

import common
import distill
import loading
import plain
from common import UserError
from data import Formatter
from evaluate import main as evaluate_main
from loading import build_distiller, load_distiller
from serving.vectors import read_vectors, save_vectors
from serving.writer import Writer
from sources.own import columns_of, examples_in
from sources.text import Tokenizer

CPU = torch.device("cpu")
DEMOS = [("the boat is green", "happy"), ("war and trade", "sad"), ("bread and music", "happy"),
         ("rain past hills", "sad")]
FREE = [("the boat", "green hills"), ("war", "trade and law"), ("bread", "music")]
ASKED = ["the river is cold", "people talk of rain and ships"]


@pytest.fixture
def llm_name(llm_folder) -> str:
    return str(llm_folder)


STATE = {"trained_on": {}, "step": 3, "metrics": {}, "commit": "abc", "flags": {"out_dir": "/home/me/run"}}


@pytest.fixture
def checkpoint(llm, tmp_path):
    """An untrained distiller of two layers, l = 4, as a run folder."""
    return save_distiller(tmp_path / "run", make_distiller(llm, seed=1), llm, **STATE)


@pytest.fixture
def argv(llm_name, checkpoint):
    return ["--llm", llm_name, "--checkpoint", str(checkpoint), "--device", "cpu", "--dtype", "fp32"]


@pytest.fixture
def demos(tmp_path):
    def write(pairs, **more):
        return write_lines(tmp_path / "demos.jsonl", [{"input": x, "output": y} | more for x, y in pairs])
    return write


@pytest.fixture
def parts(llm, llm_name, checkpoint):
    """The distiller of the checkpoint, and a formatter."""
    return load_distiller(checkpoint, llm)[0].eval(), Formatter(Tokenizer(llm_name), "space", 900)


def examples(pairs) -> list[dict]:
    return [example(x, y, ()) for x, y in pairs]


def test_labels_answers_and_vectors_equal_plain_ones(argv, llm, llm_name, parts, demos, tmp_path):
    made = ["--out", str(tmp_path / "v.safetensors"), "--ask", *ASKED]
    result, (distiller, formatter) = distill.main([*argv, "--demos", demos(DEMOS), *made]), parts
    ids = formatter.demonstrations(examples(DEMOS), 900)
    with torch.no_grad():
        vectors = plain.Distiller.forward(distiller, ids)
        torch.testing.assert_close(load_file(tmp_path / "v.safetensors")["vectors"], vectors, atol=1e-5,
                                   rtol=1e-5)
        prefixes = {"zero_shot": plain.embed(llm, []), "icl": plain.embed(llm, ids), "mend": vectors}
        for way, prefix in prefixes.items():
            for text, found in zip(ASKED, result["answers"][way], strict=True):
                x = formatter.query({"input": text}, first=way == "zero_shot")
                options = [formatter.answer(o) for o in ("happy", "sad")]
                scores = plain.score_options(llm, prefix, x, options)
                assert found == ("happy", "sad")[scores.argmax()]
    assert (result["demonstrations"], result["tokens"], result["vectors"]) == (4, len(ids), 4)
    again = distill.main(["--llm", llm_name, "--vectors", str(tmp_path / "v.safetensors"), *argv[4:], "--ask",
                          *ASKED])
    # no distiller and no demonstration at hand
    assert again["answers"] == {"mend": result["answers"]["mend"]}


def test_vectors_are_called_by_the_method_that_trained_them(argv, llm, llm_name, parts, demos, tmp_path):
    stages = {"pretrain": {"objective": "clm"}, "finetune": {"lam": 0.0}}
    folder = save_distiller(tmp_path / "hypertuning", parts[0], llm, **STATE | {"trained_on": stages})
    result = distill.main([*argv, "--checkpoint", str(folder), "--demos", demos(DEMOS), "--out",
                           str(tmp_path / "v.safetensors"), "--ask", *ASKED])
    assert list(result["answers"]) == ["zero_shot", "icl", "hypertuning"]
    again = distill.main(["--llm", llm_name, "--vectors", str(tmp_path / "v.safetensors"), *argv[4:], "--ask",
                          *ASKED])
    assert again["answers"] == {"hypertuning": result["answers"]["hypertuning"]}


def test_snippet_of_the_readme(argv, llm, llm_name, parts, demos, texts, tmp_path, monkeypatch,
                                  capsys):
    (snippet,) = re.findall(r"```python\n(.*?)```", (common.ROOT / "README.md").read_text(encoding="utf-8"),
                            re.DOTALL)
    monkeypatch.chdir(tmp_path)
    distill.main([*argv, "--demos", demos(DEMOS), "--out", "vectors.safetensors"])
    kept = load_file(tmp_path / "vectors.safetensors")["vectors"]
    (tmp_path / "snippet.py").write_text(snippet)
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "SmolLM2-135M-Instruct").symlink_to(llm_name)
    # the LLM of that folder has another name here, and a file of vectors knows its LLM's
    monkeypatch.setattr("serving.vectors.identity", lambda _: loading.identity(llm))
    capsys.readouterr()
    scope = runpy.run_path(str(tmp_path / "snippet.py"))
    assert len(ast.literal_eval(capsys.readouterr().out.splitlines()[0])) == 2
    texts.clear()
    scope["writer"].write(ASKED, max_new_tokens=5, stop="")
    for asked, ids in zip(ASKED, [text.ids for text in texts], strict=True):
        x = parts[1].query({"input": asked})
        with torch.no_grad():
            logits = plain.read(scope["llm"], kept.bfloat16(), x, ids)[-len(ids):]
        assert len(ids) > 1  # each token is the likeliest, but for the rounding of bf16
        assert (logits.max(dim=1).values - logits[range(len(ids)), ids]).max() < 0.05 * logits.std()


def test_written_answers_equal_a_greedy_loop(argv, llm, parts, demos):
    result = distill.main([*argv, "--demos", demos(FREE), "--answer-tokens", "5", "--ask", *ASKED])
    distiller, formatter = parts
    ids, steps = formatter.demonstrations(examples(FREE), 900), 5
    with torch.no_grad():
        prefixes = {"zero_shot": plain.embed(llm, []), "icl": plain.embed(llm, ids),
                    "mend": plain.Distiller.forward(distiller, ids)}
        for way, prefix in prefixes.items():
            for text, found in zip(ASKED, result["answers"][way], strict=True):
                x = formatter.query({"input": text}, first=way == "zero_shot")
                written = []
                while len(written) < steps:
                    # read gives the logits that predict each of the ids it is given: the last one's place is
                    # free
                    best = plain.read(llm, prefix, x, [*written, 0])[-1].argmax().item()
                    written.append(best)
                    if best == llm.config.eos_token_id:
                        break
                expected = formatter.tokenizer.hf.decode(written,
                                                       skip_special_tokens=True).strip().split("\n")[0]
                assert found == expected


def test_flags_say_how_answers_are_written(argv, llm, parts, demos):
    how = "--answer-tokens 7 --temperature 1.2 --top-p 0.9 --seed 4 --stop e"
    result = distill.main([*argv, "--demos", demos(FREE), *how.split(), "--ask", *ASKED])
    with torch.no_grad():
        vectors = plain.Distiller.forward(parts[0], parts[1].demonstrations(examples(FREE), 900))
    asked = {"max_new_tokens": 7, "temperature": 1.2, "top_p": 0.9, "seed": 4}
    writer = Writer(llm, parts[1], vectors)
    assert result["answers"]["mend"] == writer.write(ASKED, stop="e", **asked)
    assert result["answers"]["mend"] != writer.write(ASKED, stop="", **asked)


def test_accuracy_of_labelled_queries_with_options_of_their_own(argv, demos, tmp_path):
    queries = [{"input": text, "output": "happy", "options": ["happy"]} for text in ASKED]
    queries += [{"input": "rain", "output": "sad", "options": ["sad"]}, {"input": "law"}]
    written = write_lines(tmp_path / "q.jsonl", queries)
    result = distill.main([*argv, "--demos", demos(DEMOS), "--queries", written])
    assert result["accuracy"] == {way: 1.0 for way in ("zero_shot", "icl", "mend")}
    for answers in result["answers"].values():
        assert answers[:3] == ["happy", "happy", "sad"] and answers[3] in ("happy", "sad")


def test_answers_that_nothing_ends_are_compared_with_nothing(argv, demos, tmp_path):
    """By the template space an LLM writes on and on: 0% for every method would say nothing."""
    queries = write_lines(tmp_path / "q.jsonl", [{"input": "rain", "output": "past hills"}])
    with pytest.raises(UserError, match="q.jsonl: by the template space nothing ends a written answer"):
        distill.main([*argv, "--demos", demos(FREE), "--queries", queries])


def test_a_query_with_options_does_not_depend_on_one_without(argv, demos, tmp_path):
    choice, written = {"input": "rain", "options": ["music", "law"]}, {"input": "the river is cold"}
    found = []
    for queries in ([choice], [written], [choice, written]):
        asked = ["--answer-tokens", "3", "--queries", write_lines(tmp_path / "q.jsonl", queries)]
        found.append(distill.main([*argv, "--demos", demos(FREE), *asked])["answers"])
    for way in ("zero_shot", "icl", "mend"):
        assert found[2][way] == found[0][way] + found[1][way] and found[0][way][0] in ("music", "law")


def test_text_of_any_kind_is_read(tmp_path):
    (tmp_path / "d.jsonl").write_text('\ufeff{"input": "a\u2028b", "output": "é"}', encoding="utf-8")
    found, = examples_in("d", tmp_path / "d.jsonl", columns_of(None))
    assert (found["input"], found["output"]) == ("a\u2028b", "é")
    (tmp_path / "d.jsonl").write_bytes("é".encode("latin-1"))
    with pytest.raises(common.UserError, match="cannot be read as UTF-8"):
        examples_in("d", tmp_path / "d.jsonl", columns_of(None))


def test_labels():
    assert distill.labels_of(examples(DEMOS)) == ["happy", "sad"]
    assert distill.labels_of(examples([("a", "b"), ("c", "d")])) == []
    assert distill.labels_of(examples([("a", "b"), ("c", "b")])) == []  # one label is no choice
    assert distill.labels_of([e | {"options": ["no", "yes"]}
                              for e in examples([("a", "b"), ("c", "d")])]) == ["no", "yes"]


def test_what_is_published_is_small_says_no_path_and_can_be_evaluated(llama, llama_llm, tasks_dir, tmp_path):
    module = build_distiller("layers:2", llama_llm, 4, "residual", 1)
    about = STATE | {"trained_on": {"pretrain": {"objective": "kl"}},
                     "flags": {"out_dir": "/home/me/run", "lr": 0.1}}
    save_distiller(tmp_path / "run", module, llama_llm, start="residual", **about)
    target = tmp_path / "out" / "mine"
    distill.main(["--checkpoint", str(tmp_path / "run"), "--publish", str(target)])
    assert sorted(path.name for path in target.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert not any(b"/home/me" in path.read_bytes() for path in target.iterdir())
    tensors, kept = loading.load_checkpoint(target)
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16} and kept["flags"] == {"lr": 0.1}
    for name, p in module.state_dict().items():
        torch.testing.assert_close(tensors[f"distiller.{name}"].float(), p.float(), atol=1e-2, rtol=1e-2)
    found = evaluate_main(["--preset", "pocket", "--llm", str(llama), "--tasks", str(tasks_dir),
                           "--checkpoint", str(target), "--methods", "mend", "--k", "4", "--limit", "4",
                           "--seeds", "13", "--device", "cpu", "--out", str(tmp_path / "r.jsonl")])
    assert found["tasks"] == 2


@pytest.mark.parametrize("flags, message", [
    ("", "give --demos FILE"), ("--demos D --vectors V", "give --demos FILE"), ("--demos D", "nothing to do"),
    ("--vectors V --out O", "are in a file already"), ("--demos missing --ask x", "missing is no file"),
    ("--demos D --publish E", "leave out --demos"), ("--demos D --ask x --answer-tokens 0",
                                                    "--answer-tokens is 0"),
    ("--demos D --out D", "is there already"), ("--demos D --out D/x.safetensors", "stands under a file"),
    ("--demos D --ask x --device gpu", "--device gpu is unknown"), ("--publish .", "is there already"),
    ("--demos D --ask ' '", "--ask holds an empty text"), ("--demos D --ask x --top-p 0", "--top-p is 0"),
    ("--demos D --ask x --temperature nan", "--temperature is nan"),
    ("--demos D --ask x --context-len 0", "--context-len is 0"),
    ("--demos D --ask x --segments 0", "--segments is below 1")])
def test_bad_flags(flags, message, demos):
    argv = [a.replace("D", demos(DEMOS), 1) if a[:1] == "D" else a for a in shlex.split(flags)]
    with pytest.raises(common.UserError, match=re.escape(message)):
        distill.main(argv)


@pytest.mark.parametrize("line, message", [
    ("{", "line 1: expected"), ('{"output": "b"}', "line 1 has no input, only output; expected"),
    ('{"input": "a", "output": " "}', "line 1: output must be text, and not empty"),
    ("[1]", "line 1: expected"), ("", "is empty"), ('{"input": [1], "output": "b"}', "input must be text"),
    ('{"input": null, "output": "b"}', "no input, only output"),
    ('{"input": "a", "output": "b", "options": "bc"}', "options must be a list"),
    ('{"input": "a", "output": "b", "options": ["c"]}', "none of its options")])
def test_bad_files(line, message, tmp_path):
    (tmp_path / "d.jsonl").write_text(line + "\n")
    with pytest.raises(common.UserError, match=re.escape(message)):
        distill.main(["--demos", str(tmp_path / "d.jsonl"), "--ask", "x"])


def test_no_checkpoint_is_written_over(argv, checkpoint, demos, tmp_path):
    run, vectors = checkpoint / "best.safetensors", tmp_path / "v.safetensors"
    before = run.read_bytes()
    for out in (["--demos", demos(DEMOS), "--out", str(run)], ["--publish", str(checkpoint)]):
        with pytest.raises(common.UserError, match="is there already and holds something else"):
            distill.main([*argv, *out])
    assert run.read_bytes() == before
    for pairs in (DEMOS, DEMOS[:2]):  # vectors may take the place of vectors
        distill.main([*argv, "--demos", demos(pairs), "--out", str(vectors)])
    with pytest.raises(common.UserError, match="cannot be written"):
        distill.main([*argv, "--publish", "/proc/nowhere/x"])


def test_vectors_of_another_llm_and_no_vectors_are_refused(gpt2, llama_llm, tmp_path):
    llm, other = load(gpt2), llama_llm
    path = str(tmp_path / "v.safetensors")
    save_vectors(path, torch.zeros(4, 32), {"llm": loading.identity(llm), "template": "space"})
    with pytest.raises(common.UserError, match="belong to the LLM"):
        read_vectors(path, other)
    (tmp_path / "v.safetensors").write_text("no")
    with pytest.raises(common.UserError, match="is no file that --out has written"):
        read_vectors(path, llm)


def test_the_published_checkpoint_is_small_and_names_its_data():
    size = distill.PUBLISHED.stat().st_size
    _, state = loading.load_checkpoint(distill.PUBLISHED, weights=False)
    assert size <= 45e6 and state["trained_on"]["finetune"]["tasks"] == "functions early recall metaicl"
    assert state["trained_on"].keys() == {"pretrain", "finetune"} and "bigbench" not in json.dumps(state)
    assert state["model"]["llm"]["name"] == "SmolLM2-135M-Instruct"
    assert all(type(value) in (int, float) for value in state["flags"].values())
    card = (distill.PUBLISHED.parent / "README.md").read_text()
    assert distill.PUBLISHED.name in card and loading.checkpoint_id(distill.PUBLISHED).split("@")[1] in card


def test_tables_columns_and_numbers_are_read_as_evaluate_reads_them(argv, tmp_path, capsys):
    (tmp_path / "d.csv").write_text("text,label\n" + "\n".join(f"boat {i},{i % 2}" for i in range(6)))
    argv += ["--demos", str(tmp_path / "d.csv"), "--columns", "input=text", "output=label"]
    asked = ["--queries", str(tmp_path / "q.jsonl")]
    (tmp_path / "q.jsonl").write_text('{"text": "a cold boat", "label": 1}\n{"text": "rain"}\n')
    made = distill.main([*argv, *asked])
    assert made["demonstrations"] == 6 and {a for two in made["answers"].values() for a in two} <= {"0", "1"}
    assert "answers: one of 0, 1\n" in capsys.readouterr().out
    (tmp_path / "q.jsonl").write_text('{"text": "rain", "label": 2}\n')
    with pytest.raises(UserError, match="q.jsonl, line 1: the output '2' is no label of the demonstrations"):
        distill.main([*argv, *asked])
    (tmp_path / "notes.json").write_text("{}")
    with pytest.raises(UserError, match="notes.json is no file .jsonl.*, .csv, .tsv or .parquet; give one"):
        distill.main([*argv, "--demos", str(tmp_path / "notes.json"), "--ask", "x"])


def test_what_is_cut_of_an_input_is_told(argv, tmp_path, capsys):
    write_lines(tmp_path / "d.jsonl", [{"input": "rain " * 300, "output": "wet"},
                                       {"input": "sun", "output": "dry"}])
    distill.main([*argv, "--demos", str(tmp_path / "d.jsonl"), "--ask", "x"])
    out = capsys.readouterr().out
    assert "note: 1 inputs are cut after 256 tokens: 'rain rain" in out and "answers: written\n" in out
