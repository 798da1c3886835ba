"""Runs of the two training scripts on the smallest of settings, and what they leave behind."""

import json
from pathlib import Path

import torch

import run
from loading import load_checkpoint

METRICS = ("dev_option_ce", "dev_pred", "dev_kl", "dev_clm", "dev_headline")
PROMPT_TUNING = ["--distiller", "free", "--lam", "0", "--init-from", "none"]


def stub_dev(monkeypatch, script, option_ce: list[float], seen: list | None = None) -> None:
    """Evaluations with these values of what decides; all other metrics fall all the way."""
    feed, seen = iter(option_ce), [] if seen is None else seen

    def dev(llm, distiller, *_):
        seen.append({name: t.clone() for name, t in distiller.state_dict().items()})
        return dict.fromkeys(METRICS, 9.0 - len(seen)) | {"dev_option_ce": next(feed)}
    monkeypatch.setattr(script, "dev_metrics", dev)


def train(script, argv: list[str], folder: Path, *more: str) -> dict:
    return script.main([*argv, *more, "--out-dir", str(folder)])


def state_of(folder: Path, name: str = "last") -> dict:
    return load_checkpoint(folder / f"{name}.safetensors", weights=False)[1]


def metrics(folder: Path, key: str) -> dict[int, float]:
    """step -> value; a step that is logged twice fails."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if key in record]
    found = {record["step"]: record[key] for record in records}
    assert len(found) == len(records), f"a step is logged twice: {records}"
    return found


def assert_same(folder: Path, other: Path, name: str = "last", least: int = 21) -> None:
    """Every tensor equal bit by bit, and the run's state but for its flags."""
    (a, state), (b, other_state) = (load_checkpoint(f / f"{name}.safetensors") for f in (folder, other))
    assert a.keys() == b.keys() and len(a) >= least
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert {**state, "flags": 0} == {**other_state, "flags": 0}


def furthest(folder: Path, other: Path, kind: str) -> float:
    """Largest difference between two runs' weights (kind "distiller.") or first moments (".exp_avg")."""
    a, b = (load_checkpoint(f / "last.safetensors")[0] for f in (folder, other))
    names = [n for n in a if (n.startswith(kind) if kind == "distiller." else n.endswith(kind))]
    assert a.keys() == b.keys() and len(names) > 10
    return max((a[n] - b[n]).abs().max().item() for n in names)


def interrupt_after(monkeypatch, step: int) -> None:
    """A Ctrl-C right after the record of optimiser step `step` was written, so before its checkpoint."""
    log = run.Run.log

    def stop(run, **record):
        log(run, **record)
        if run.step == step and "grad_norm" in record:
            raise KeyboardInterrupt
    monkeypatch.setattr(run.Run, "log", stop)
