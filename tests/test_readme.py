"""Every command that the README and the scripts' own help show is understood by the script it calls."""

import ast
import re
import shlex
from pathlib import Path

import pytest

import bench
import common
import data
import distill
import evaluate
import train_finetune
import train_pretrain
from paper import attention, figures, probe, tables
from pocket import assets

SCRIPTS = {m.__name__: m for m in (assets, attention, bench, data, distill, evaluate, figures, probe,
                                   train_finetune, train_pretrain)}
PLACES = ["README.md", "results/LOG.md", "results/SPEED.md", "checkpoints/README.md", "Makefile",
          *(f"{name.replace('.', '/')}.py" for name in SCRIPTS)]
CALLED = {f"-m {name}" if "." in name else f"{name}.py": script for name, script in SCRIPTS.items()}


def commands() -> list[str]:
    found = []
    for place in PLACES:
        text = (common.ROOT / place).read_text().replace("\\\n", " ")
        found += re.findall(rf"((?:python|nproc_per_node \d+) (?:{'|'.join(map(re.escape, CALLED))})(?![.\w])[^\n`#|]*)", text)
    return sorted(set(found))


def test_commands_are_found():
    text = " ".join(commands())
    assert all(called in text for called in CALLED) and len(commands()) > 12


def test_the_tests_that_the_readme_names_are_there():
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (common.ROOT / "README.md").read_text())
    assert len(named) >= 8
    for file, test in named:
        assert f"def {test}(" in (common.ROOT / "tests" / file).read_text(), test


@pytest.mark.parametrize("command", commands())
def test_command_parses(command):
    called, flags = re.search(rf"({'|'.join(map(re.escape, CALLED))})(.*)", command).groups()
    args = CALLED[called].get_parser().parse_args(shlex.split(flags.replace("$(DEMO)", "out/demo").replace("$(PUBLISHED)", "x.safetensors").replace("$(if $(filter gemma,$(LLM)),--only gemma)", "").replace("$", "")))
    if "split" in args:
        assert args.split in (*common.SPLITS, "S")


@pytest.mark.parametrize("file", sorted((common.ROOT / "results").glob("table2-*.jsonl")), ids=lambda path: path.stem)
def test_the_readme_has_the_figures_of_the_committed_results(file):
    text = (common.ROOT / "README.md").read_text(encoding="utf-8")
    records = evaluate.read_results(file)
    for method in {r["method"] for r in records} - {"majority"}:
        mine = {(r["task"], r["seed"]): (100 * r["headline"], r["n"]) for r in records if r["method"] == method}
        found = tables.summary(mine)
        assert f"| {found['mean']:.2f}" + (f" ±{found['std']:.2f}" if found["std"] else "") in text, method


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_a_script_calls_its_main_after_all_it_needs_is_defined(script):
    last = ast.parse(Path(script.__file__).read_text()).body[-1]
    assert isinstance(last, ast.If) and ast.unparse(last.test) == "__name__ == '__main__'"
