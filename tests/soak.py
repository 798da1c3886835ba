"""Kills, signals and full disks at random moments of both stages and of evaluation; what is there in the end
is compared with an uninterrupted run's.

    python tests/soak.py --kills 50        # 5 to 30 minutes on two cores; paper/runs/soak.sh

A tiny random LLM on the CPU. A full disk is a limit on the size of files, at which a write fails alike. The
last line is JSON: how many of each there were, and what differs (nothing, or the exit code is 1).
"""

import argparse
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import conftest
import torch
from tqdm import tqdm

from common import ROOT
from loading import load_checkpoint

SIGNALS = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}  # exit codes
SECONDS = 0.6  # a signal comes within these after the first line that a process writes
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


def disturb(command: list[str], places: dict[str, Path], watched: Path, kills: int, rng: random.Random,
            bar: tqdm) -> tuple[list[str], list[str]]:
    """Run a part with a signal or on a full disk again and again until that has stopped it `kills` times; a
    run that comes to its end is compared with the uninterrupted one and begun anew, and so is the last.

    Returns:
        What stopped it and with which exit code, and the names of what differed at any end.
    """
    happened, differ = [], []
    full = kills // 2  # the disk is full once, in the middle
    while True:
        disk, number = len(happened) == full, rng.choice(list(SIGNALS))
        process = start(command, full=disk)
        if len(happened) < kills and not disk:
            wait_for_growth(process, watched, rng.uniform(0, SECONDS))
            process.send_signal(number)  # nothing happens to one that has ended
        out, _ = process.communicate()
        name, expected = ("full disk", [2]) if disk else (number.name, [SIGNALS[number], -number])
        if process.returncode in expected and len(happened) < kills:  # -number: before or after our handlers
            happened.append(f"{name}, exit code {process.returncode}")
            bar.update()
        elif process.returncode:
            raise AssertionError(f"{name}: exit code {process.returncode}\n{out[-2000:]}")
        else:
            differ += differences(contents(places["whole"]), contents(places["cut"]))
            if len(happened) == kills:
                return happened, differ
            shutil.rmtree(places["cut"]) if places["cut"].is_dir() else places["cut"].unlink()


def wait_for_growth(process: subprocess.Popen, watched: Path, seconds: float) -> None:
    """Until a line is written to `watched`, and so many seconds more; no longer than the process runs."""
    size = watched.stat().st_size if watched.exists() else 0
    while process.poll() is None and (watched.stat().st_size if watched.exists() else 0) == size:
        time.sleep(0.01)
    time.sleep(seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="disturbances in all, over three parts")
    parser.add_argument("--seed", type=int, default=0, help="of moments and signals")
    args = parser.parse_args()
    rng, stopped, differ, began = random.Random(args.seed), {}, {}, time.time()
    kills = -(-args.kills // 3)
    with tempfile.TemporaryDirectory() as name, tqdm(total=3 * kills, unit="kill") as bar:
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
            stopped[part], differ[part] = disturb([*command, option, str(places["cut"])], places, watched,
                                                  kills, rng, bar)
    failed = any(differ.values()) or max(growth.values()) > 0.03
    stopped = {part: Counter(sorted(found)) for part, found in stopped.items()}
    print(json.dumps({"stopped": stopped, "differ": differ, "memory_growth": growth,
                      "minutes": round((time.time() - began) / 60)}))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
