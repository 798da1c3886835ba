"""Loggers beside metrics.jsonl: the real TensorBoard, and a stand-in for wandb that keeps its calls."""

import importlib.machinery
import sys
from types import SimpleNamespace

import pytest
from conftest import read_lines
from training import assert_same, train

import run
import train_finetune
from common import UserError
from sources import logs


def cut_at(monkeypatch, step: int):
    """A process that ends, killed, after a step that was logged but not saved."""
    end = run.Run.end_step

    def killed(self, n_tokens):
        end(self, n_tokens)
        if self.step == step:
            raise KeyboardInterrupt
    monkeypatch.setattr(run.Run, "end_step", killed)


def expected_of(folder) -> dict:
    """{name: {step: value}} of metrics.jsonl."""
    found: dict = {}
    for line in read_lines(folder / "metrics.jsonl"):
        for name, value in line.items():
            if name != "step":
                found.setdefault(name, {})[line["step"]] = value
    return found


def test_tensorboard_holds_what_metrics_hold(finetuning, quick_dev, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    argv = [*finetuning, "--steps", "6", "--save-every", "2", "--log", "tensorboard"]
    with monkeypatch.context() as patch:
        cut_at(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            train(train_finetune, argv, tmp_path / "run")
    train(train_finetune, argv, tmp_path / "run", "--resume")
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    expected = expected_of(tmp_path / "run")
    assert {*board.Tags()["scalars"]} == {*expected} and [*expected["kl"]] == [1, 2, 3, 4, 5, 6]
    for name, values in expected.items():
        found = [(e.step, e.value) for e in board.Scalars(name)]
        assert found == [(step, pytest.approx(v, rel=1e-6)) for step, v in sorted(values.items())], name


@pytest.mark.parametrize("where", ["before the first save", "before an evaluation is saved"])
def test_tensorboard_keeps_no_second_value_of_a_step(finetuning, quick_dev, tmp_path, monkeypatch, where):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    argv = [*finetuning, "--steps", "6", "--save-every", "2", "--eval-every", "4", "--log", "tensorboard"]
    with monkeypatch.context() as patch:
        if where == "before the first save":
            argv[argv.index("--save-every") + 1] = "6"  # the only checkpoint is of step 0
            cut_at(patch, 3)
        else:
            log = run.Run.log

            def killed(self, **record):
                log(self, **record)
                if self.step == 4 and "dev_option_ce" in record:
                    raise KeyboardInterrupt
            patch.setattr(run.Run, "log", killed)
        with pytest.raises(KeyboardInterrupt):
            train(train_finetune, argv, tmp_path / "run")
    train(train_finetune, argv, tmp_path / "run", "--resume")
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    for name, values in expected_of(tmp_path / "run").items():
        found = [(e.step, e.value) for e in board.Scalars(name)]
        assert found == [(step, pytest.approx(v, rel=1e-6)) for step, v in sorted(values.items())], name


@pytest.fixture
def wandb(monkeypatch) -> SimpleNamespace:
    """Its calls in `made`: ("init", arguments) and ("log", values, step), but for those that the real client
    leaves out: of a step after the last one logged, and, of a run that is resumed, of that one too."""
    made = []
    module = SimpleNamespace(
        made=made, fails=False, least=0, __spec__=importlib.machinery.ModuleSpec("wandb", None))

    def init(**given):
        module.least += any(kind == "log" for kind, *_ in made)
        made.append(("init", given))
        return SimpleNamespace(log=log)

    def log(values, step):
        if module.fails:
            raise ConnectionError("no network")
        if step >= module.least:
            module.least = step
            made.append(("log", values, step))
    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_goes_on_with_the_same_run(finetuning, quick_dev, tmp_path, monkeypatch, wandb):
    argv = [*finetuning, "--steps", "6", "--save-every", "2", "--log", "wandb"]
    with monkeypatch.context() as patch:
        cut_at(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            train(train_finetune, argv, tmp_path / "run")
    train(train_finetune, argv, tmp_path / "run", "--resume")
    first, second = (given for kind, *given in wandb.made if kind == "init")
    assert first[0]["id"] == second[0]["id"] and len(first[0]["id"]) == 8 and second[0]["resume"] == "allow"
    assert first[0]["config"]["steps"] == 6 and first[0]["name"] == "run"
    found: dict = {}
    for kind, *given in wandb.made:
        if kind == "log":
            for name, value in given[0].items():
                assert given[1] not in found.setdefault(name, {}), "a step is logged twice"
                found[name][given[1]] = value
    expected = expected_of(tmp_path / "run")
    assert found.pop("seconds").keys() == expected.pop("seconds").keys()  # step 5 took another time again
    assert found == expected


def test_a_logger_that_fails_changes_nothing(finetuning, quick_dev, tmp_path, wandb, capsys):
    train(train_finetune, finetuning, tmp_path / "plain")
    wandb.fails = True
    train(train_finetune, [*finetuning, "--log", "wandb"], tmp_path / "logged")
    assert_same(tmp_path / "plain", tmp_path / "logged")
    assert capsys.readouterr().out.count("note: --log wandb stopped (ConnectionError: no network)") == 1
    wandb.init = None  # cannot be begun at all
    train(train_finetune, [*finetuning, "--log", "wandb"], tmp_path / "none")
    assert_same(tmp_path / "plain", tmp_path / "none")
    assert "note: --log wandb stopped (TypeError" in capsys.readouterr().out


def test_a_client_that_is_missing_is_named_before_any_work(finetuning, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="--log wandb needs the package wandb: pip install wandb"):
        train_finetune.main([*finetuning, "--log", "wandb"])
    assert logs.make_logger("none", None, {}, 0)({"step": 1}) is None
