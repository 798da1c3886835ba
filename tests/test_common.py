"""Tests of common.py: presets and flags, the hub probe, errors at the command line."""

import json
import time
from types import SimpleNamespace

import pytest
import requests
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import common
import evaluate
import train_finetune
import train_pretrain
from common import UserError, did_you_mean, run_main
from paper import collection
from sources import hub

SCRIPTS = [collection, evaluate, train_pretrain, train_finetune]


def parsed(script, argv):
    presets = getattr(script, "PRESETS", {"paper": {}, "pocket": {}})
    return common.parse(script.get_parser(), argv, presets)


def test_preset_fills_only_flags_that_were_not_given():
    given = parsed(train_pretrain, ["--preset", "pocket", "--distill-len", "7", "--lr", "0.5", "--window",
                                    "33"])
    assert (given.distill_len, given.lr, given.window) == (7, 0.5, 33)
    for preset in ("paper", "pocket"):
        expected = {**common.PRESETS[preset], **train_pretrain.PRESETS[preset]}
        args = vars(parsed(train_pretrain, ["--preset", preset]))
        assert {name: args[name] for name in expected} == expected
    rest = {**common.PRESETS["pocket"], **train_pretrain.PRESETS["pocket"]}
    assert all(getattr(given, n) == v for n, v in rest.items() if n not in ("distill_len", "lr", "window"))


def test_a_given_zero_is_not_taken_for_a_missing_flag():
    assert parsed(train_pretrain, ["--preset", "paper", "--patience", "0"]).patience == 0


@pytest.mark.parametrize("cuda, preset, why", [(False, "pocket", "no CUDA device is there"),
                                               (True, "paper", "a CUDA device is there")])
def test_first_line_names_preset_reason_and_how_to_change_it(monkeypatch, capsys, cuda, preset, why):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    args = parsed(train_finetune, [])
    first = capsys.readouterr().out.splitlines()[0]
    other = {"paper": "pocket", "pocket": "paper"}[preset]
    assert args.preset == preset
    assert first.startswith(f"preset {preset} ({why}): ") and f"--preset {other}" in first
    assert f"l = {common.PRESETS[preset]['distill_len']}" in first


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.__name__)
def test_help_shows_both_presets_values(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "(paper: gpt2-large; pocket: SmolLM2-135M-Instruct)" in text


@pytest.mark.parametrize("script, flag, value", [
    (train_pretrain, "--split", "qa_to_qa"), (train_finetune, "--corpus", "sotu"),
    (evaluate, "--distiller", "layers:2"), (evaluate, "--corpus", "sotu"), (evaluate, "--seed", "13"),
    (collection, "--distill-len", "4"), (collection, "--corpus", "sotu")])
def test_a_flag_without_a_part_is_refused(script, flag, value, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main([flag, value])
    assert stop.value.code == 2 and f"unrecognized arguments: {flag}" in capsys.readouterr().err


def test_long_name_of_the_paraphrase_split():
    assert parsed(collection, ["--split", "non_paraphrase_to_paraphrase"]).split == "non_para_to_para"


def test_shared_faults_are_listed_together():
    with pytest.raises(UserError) as error:
        train_finetune.main(["--preset", "pocket", "--split", "class_to_clas", "--k", "0", "--distill-len",
                             "0", "--seed", "-1", "--dtype", "fp16", "--device", "cpu"])
    for part in ("--split class_to_clas", "class_to_class", "--k is 0", "--distill-len is 0", "--seed is -1",
                 "fp16"):
        assert part in str(error.value)


def test_eight_bit_weights_need_cuda_and_two_packages(monkeypatch):
    flags = ["--preset", "pocket", "--methods", "icl", "--llm-weights", "8bit"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--llm-weights 8bit needs a CUDA device; use fp32 or bf16"):
        evaluate.main(flags)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(common.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package bitsandbytes: pip install bitsandbytes.*"
                                        "the package accelerate"):
        evaluate.main(flags)


def test_a_macs_gpu_is_taken_where_torch_has_it_and_refused_elsewhere(monkeypatch):
    """No Mac is at hand: what is chosen for one, not what it computes."""
    def broken(**flags):
        rules = common.device_rules(SimpleNamespace(**{"device": "mps", "dtype": "auto"} | flags))
        return [message for holds, message in rules if not holds]

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert [m.partition(" (")[0] for m in broken()] == ["--device mps, but torch sees no GPU of a Mac"]
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert broken() == broken(dtype="bf16") == []
    assert broken(dtype="fp16") == ["--dtype fp16 on a Mac; use fp32 or bf16 there"]
    for training in (False, True):
        args = SimpleNamespace(device="mps", dtype="auto")
        assert common.setup(args, training) == torch.device("mps") and args.dtype == "fp32"
    args = SimpleNamespace(device="auto", dtype="auto")
    assert common.setup(args, False).type != "mps"  # untried: only where asked for
    monkeypatch.setenv("WORLD_SIZE", "2")
    (said,) = broken()
    assert said.startswith("--device mps is one device") and said.endswith("start with python")


@pytest.mark.parametrize("in_hardware, dtype", [(True, "bf16"), (False, "fp16")])
def test_a_gpu_is_the_one_measured_and_emulates_no_bf16(monkeypatch, in_hardware, dtype):
    measured = []
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", measured.append)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",  # a T4 says yes unless asked so
                        lambda including_emulation=True: including_emulation or in_hardware)
    for name in ("cuda", "cuda:1"):
        args = SimpleNamespace(device=name, dtype="auto")
        assert common.setup(args, training=True) == torch.device(name) and args.dtype == dtype
    assert measured == [torch.device("cuda:1")]


def test_unknown_device_is_a_user_error():
    with pytest.raises(UserError, match="--device"):
        evaluate.main(["--preset", "pocket", "--methods", "icl", "--device", "gpu"])


def test_did_you_mean():
    assert did_you_mean("agnews", ["emo", "ag_news"]) == "did you mean ag_news?"
    assert did_you_mean("qa_to_q", ["hr_to_lr", "qa_to_qa"]).startswith("did you mean qa_to_qa")
    assert did_you_mean("zzz", ["b", "a"]) == "known: a, b"


def test_run_main_turns_a_user_error_into_one_paragraph_and_code_2(capsys):
    def main():
        raise UserError("--k is 0; give at least 1")
    with pytest.raises(SystemExit) as stop:
        run_main(main)
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.err == "error: --k is 0; give at least 1\n" and captured.out == ""


def test_run_main_hides_no_other_error():
    with pytest.raises(ZeroDivisionError):
        run_main(lambda: 1 / 0)


@pytest.fixture
def fresh_probe():
    hub.hub_reachable.cache_clear()
    yield
    hub.hub_reachable.cache_clear()


def test_hub_is_not_asked_when_offline(fresh_probe, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(requests, "head",
                        lambda *_, **__: pytest.fail("asked the hub although HF_HUB_OFFLINE is set"))
    assert hub.hub_reachable() is False


def test_hub_probe_says_yes_when_the_hub_answers(fresh_probe, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(requests, "head", lambda *_, **__: SimpleNamespace(status_code=200))
    assert hub.hub_reachable() is True
    hub.require_hub("--llm gpt2")


@pytest.mark.parametrize("fault", ["hangs", "refuses"])
def test_require_hub_gives_up_within_three_seconds(fresh_probe, monkeypatch, fault):
    def head(*_, **__):
        if fault == "hangs":  # a name look-up that ignores the time limit
            time.sleep(10)
        raise requests.ConnectionError
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(requests, "head", head)
    started = time.time()
    with pytest.raises(UserError, match="--llm x would come from the model hub.*--preset pocket"):
        hub.require_hub("--llm x")
    assert time.time() - started < 3


@pytest.mark.parametrize("script, extra", [(train_pretrain, []), (train_finetune, ["--tasks", "TASKS"]),
                                           (evaluate, ["--tasks", "TASKS", "--methods", "icl"])],
                         ids=lambda v: getattr(v, "__name__", ""))
def test_paper_preset_without_a_hub_names_the_pocket_command(script, extra, tasks_dir, capsys, monkeypatch):
    monkeypatch.setattr("sources.hub.try_to_load_from_cache", lambda *_: None)
    argv = ["--preset", "paper", *(str(tasks_dir) if a == "TASKS" else a for a in extra)]
    started = time.time()
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: script.main(argv))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and time.time() - started < 5
    assert err.startswith("error: --llm gpt2-large") and "make assets" in err and "--preset pocket" in err
    assert "Traceback" not in err


def test_finish_prints_one_json_line(capsys):
    assert common.finish({"a": 1.5, "b": None}) == {"a": 1.5, "b": None}
    assert json.loads(capsys.readouterr().out) == {"a": 1.5, "b": None}


class Products(TorchDispatchMode):
    """Keeps the types in which batches of matrices are multiplied."""

    def __init__(self):
        super().__init__()
        self.types = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.bmm.default:
            self.types.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


def test_plain_attention_of_short_rows_multiplies_in_bf16_and_agrees_with_fp32():
    q, k, v = torch.randn(3, 2, 4, 24, 16, generator=torch.Generator().manual_seed(0))
    rows = [{"demo": [0] * 16, "queries": [([0] * 4, [[0] * 4])]}] * 2
    exact = torch.softmax(q @ k.transpose(-1, -2) / 4, dim=-1) @ v
    with common.attention_for(rows, torch.device("cpu")), Products() as products:
        half = F.scaled_dot_product_attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
        assert products.types == {torch.bfloat16}
        assert (F.scaled_dot_product_attention(q, k, v) - exact).abs().max() < 1e-6
    assert (half.float() - exact).abs().max() < 0.03 < exact.abs().max()


def test_torchruns_report_has_the_message(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))

    def fault():
        raise UserError("give another --llm")
    with pytest.raises(SystemExit):
        common.run_main(fault)
    assert "give another --llm" in (tmp_path / "error.json").read_text()
    assert capsys.readouterr().err == "error: give another --llm\n"
