"""Tests of functions.py: what a function gives, and that no two are the same one."""

import pytest

from sources.functions import DOMAINS, answers, inputs
from sources.synthetic import Functions, parts_of


@pytest.mark.parametrize(("domain", "name", "x", "y"), [
    ("noun", "plural", "child", "children"), ("noun", "article", "apple", "an apple"),
    ("noun", "spelled", "leaf", "l-e-a-f"), ("verb", "past", "catch", "caught"),
                                                        ("verb", "gerund", "run", "running"),
    ("adjective", "superlative", "happy", "happiest"), ("trio", "last", "a, bb, c", "c"),
    ("trio", "longest", "a, bb, c", "bb"), ("trio", "rotated", "a, b, c", "b, c, a"),
    ("number", "roman", "944", "CMXLIV"), ("number", "ordinal", "22", "22nd"),
    ("number", "German", "21", "einundzwanzig"), ("country", "capital", "France", "Paris"),
    ("country", "German", "Spain", "Spanien"), ("date", "unnatural", "1999-12-31", "!12!31!1999!"),
    ("date", "day first", "2001-02-03", "3 February 2001"), ("path", "copy", "a/b.txt", "a/b_copy.txt"),
    ("sentence", "passive", "The king sees the bread", "The bread is seen by the king"),
    ("sentence", "question", "The lion draws the stone", "Does the lion draw the stone?")])
def test_functions_give_what_their_names_say(domain, name, x, y):
    assert DOMAINS[domain][name](x) == y


def test_there_are_many_functions_and_each_is_defined_on_all_its_inputs():
    tasks = Functions()
    assert len(tasks.test) >= 40 and len({parts_of(t)[:2] for t in tasks.train}) >= 100
    for domain, functions in DOMAINS.items():
        assert len(inputs(domain)) == len(set(inputs(domain))) >= 64
        seen = {name: tuple(answers(domain, x)[name] for x in inputs(domain)) for name in functions}
        assert all(y and y == y.strip() for ys in seen.values() for y in ys)
        assert len(set(seen.values())) == len(functions), "two functions of a domain are the same one"
