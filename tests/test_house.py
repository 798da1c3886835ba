"""The laws of the house: how much there is to read, and which way imports go."""

import ast

import pytest

import common

READING = ("plain", "model", "score", "data", "run", "train_pretrain", "train_finetune", "evaluate")
FILES = sorted(path for folder in (".", "sources", "paper", "serving")
               for path in (common.ROOT / folder).glob("*.py"))


def test_the_reading_set_is_read_in_an_evening():
    assert sum(len((common.ROOT / f"{name}.py").read_text().splitlines()) for name in READING) <= 2000
    assert len(list(common.ROOT.glob("*.py"))) <= 13


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(common.ROOT)))
def test_no_file_and_no_function_is_too_long(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


def test_the_page_and_common_stand_alone_and_scripts_are_leaves():
    ours = {path.stem for path in common.ROOT.glob("*.py")} | {"sources", "paper", "serving"}
    imported: dict[str, set[str]] = {}
    for path in FILES:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        names = {name.partition(".")[0] for name in names}
        imported[str(path.relative_to(common.ROOT))] = names & ours
    assert imported["plain.py"] == imported["common.py"] == set()
    assert imported["model.py"] == {"common"} and imported["data.py"] <= {"common", "sources", "paper"}
    for script in ("train_pretrain", "train_finetune", "distill", "evaluate"):
        assert not [path for path, names in imported.items() if script in names]
