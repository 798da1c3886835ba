"""Tests of choose.py: a row for each LLM and template, and none lost after another."""

import shutil

import pytest

from common import UserError
from paper import choose


@pytest.fixture
def argv(llama, tasks_dir) -> list[str]:
    return ["--preset", "pocket", "--llm", str(llama), "--tasks", str(tasks_dir), "--device", "cpu",
            "--k", "4", "--templates", "space"]


def test_what_is_given_twice_counts_once(argv, llama):
    twice = choose.main([*argv, "--llms", str(llama), str(llama), "--seeds", "100", "100"])
    assert twice == choose.main(argv) and list(twice["found"]) == ["tiny-llama, space"]
    assert twice["seeds"] == [100]


def test_two_llms_of_one_name_are_refused(argv, llama, tmp_path):
    shutil.copytree(llama, tmp_path / llama.name)
    with pytest.raises(UserError, match="two folders have one name"):
        choose.main([*argv, "--llms", str(llama), str(tmp_path / llama.name)])
