"""Kills, signals and full disks at random moments of both stages and of evaluation; what is there in the end
is compared with an uninterrupted run's.

    python tests/soak.py --kills 50        # some 30 minutes on two cores; paper/runs/soak.sh

A tiny random LLM on the CPU. A full disk is a limit on the size of files, at which a write fails alike. The
last line is JSON: how many of each there were, and what differs (nothing, or the exit code is 1).
"""

import argparse
import json
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import conftest
import torch
from tqdm import tqdm

from common import ROOT
from loading import load_checkpoint

SIGNALS = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}  # exit codes
FULL = 20_000  # bytes of a file where the disk is full: below any checkpoint's


def commands(folder: Path) -> dict[str, tuple[list[str], str]]:
    """What to run in each part, and the option that names where it writes."""
    llm = conftest.write_llm(folder / "tiny-llama", "llama")
    tasks = conftest.write_class_tasks(folder / "tasks")
    text = conftest.write_corpus(folder / "text")
    common = ["--preset", "pocket", "--llm", str(llm), "--tasks", str(tasks), "--dtype", "fp32", "--device",
              "cpu", "--k", "4"]
    training = ["--distiller", "layers:2", "--distill-len", "4", "--steps", "120", "--eval-every", "40",
                "--save-every", "5", "--batch-size", "2", "--patience", "0", "--resume"]
    return {"pretrain": (["train_pretrain.py", *common, *training, "--corpus", str(text), "--window", "64",
                          "--min-doc-len", "32", "--eval-docs", "2"], "--out-dir"),
            "finetune": (["train_finetune.py", *common, *training, "--queries-per-demo", "2", "--init-from",
                          str(folder / "whole" / "pretrain")], "--out-dir"),
            "evaluate": (["evaluate.py", *common, "--methods", "zero_shot", "icl", "mend", "mend_constant",
                          "--checkpoint", str(folder / "whole" / "finetune")], "--out")}


def start(command: list[str], full: bool = False) -> subprocess.Popen:
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (FULL, resource.RLIM_INFINITY))
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, preexec_fn=limit if full else None)


def memory_growth(process: subprocess.Popen, metrics: Path, steps: int = 120) -> float:
    """Resident memory at the end of a training over that at its half, less one; waits for the end."""
    sizes: dict[int, int] = {}
    while process.poll() is None:
        lines = metrics.read_text().count("\n") if metrics.exists() else 0
        status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        if found := [int(line.split()[1]) for line in status if line.startswith("VmRSS")]:
            sizes[lines] = found[0]
        time.sleep(0.05)
    half = [size for lines, size in sizes.items() if lines >= steps // 2]
    return half[-1] / half[0] - 1 if half else 0.0


def contents(place: Path) -> dict:
    """All that a part leaves, without times and dates."""
    if place.is_file():
        lines, files = place.read_text().splitlines(), {}
    else:
        lines = (place / "metrics.jsonl").read_text().splitlines()
        files = {name: load_checkpoint(place / f"{name}.safetensors") for name in ("last", "best")}
    drop = {"seconds", "date"}
    found = {"lines": [{k: v for k, v in json.loads(line).items() if k not in drop} for line in lines]}
    for name, (tensors, state) in files.items():
        found |= {f"{name} {key}": t for key, t in tensors.items()}
        found[f"{name} state"] = {k: v for k, v in state.items() if k != "flags"}
    return found


def differences(whole: dict, cut: dict) -> list[str]:
    def same(a, b) -> bool:
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return sorted(name for name in whole.keys() | cut.keys()
                  if name not in whole or name not in cut or not same(whole[name], cut[name]))


def disturb(command: list[str], place: Path, kills: int, rng: random.Random,
            bar: tqdm) -> list[tuple[str, int]]:
    """Run a part again and again, each time with a signal or on a full disk, and at last to its end."""
    happened, full = [], kills // 2  # the disk is full once in the middle
    for i in range(kills):
        process = start(command, full=i == full)
        size, began = place.stat().st_size if place.exists() else 0, time.time()
        wait = rng.random()
        while process.poll() is None and i != full and time.time() - began < 120:
            if (place.stat().st_size if place.exists() else 0) != size:
                time.sleep(wait)
                break
            time.sleep(0.02)
        number = rng.choice(list(SIGNALS))
        if process.poll() is None and i != full:
            process.send_signal(number)
        out, _ = process.communicate()
        name = "full disk" if i == full else number.name
        expected = (0, 2) if i == full else (0, SIGNALS[number])
        if process.returncode not in expected:
            raise AssertionError(f"{name}: exit code {process.returncode}\n{out[-2000:]}")
        happened.append((name, process.returncode))
        bar.update()
    process = start(command)
    out, _ = process.communicate()
    if process.returncode:
        raise AssertionError(f"the last run ended with {process.returncode}\n{out[-2000:]}")
    return happened


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="disturbances in all, over three parts")
    parser.add_argument("--seed", type=int, default=0, help="of moments and signals")
    args = parser.parse_args()
    rng, happened, differ = random.Random(args.seed), [], {}
    with tempfile.TemporaryDirectory() as name, tqdm(total=args.kills // 3 * 3, unit="kill") as bar:
        folder = Path(name)
        growth = {}
        for part, (command, option) in commands(folder).items():
            places = {kind: folder / kind / (f"{part}.jsonl" if part == "evaluate" else part)
                      for kind in ("whole", "cut")}
            process = start([*command, option, str(places["whole"])])
            if part != "evaluate":
                growth[part] = round(memory_growth(process, places["whole"] / "metrics.jsonl"), 4)
            out, _ = process.communicate()
            if process.returncode:
                raise AssertionError(f"{part} ended with {process.returncode}\n{out[-2000:]}")
            watched = places["cut"] if part == "evaluate" else places["cut"] / "metrics.jsonl"
            happened += disturb([*command, option, str(places["cut"])], watched, args.kills // 3, rng, bar)
            differ[part] = differences(contents(places["whole"]), contents(places["cut"]))
    counts = {f"{name}, exit {code}": happened.count((name, code)) for name, code in sorted(set(happened))}
    failed = any(differ.values()) or max(growth.values()) > 0.03
    print(json.dumps({"disturbed": counts, "differ": differ, "memory_growth": growth}))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
