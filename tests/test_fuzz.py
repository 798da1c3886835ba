"""Files that hypothesis makes: each is read for what it says, or refused with its name; nothing else happens.

    FUZZ=2000 python -m pytest tests/test_fuzz.py      # so many of each; paper/runs/soak.sh
"""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import make_distiller, save_distiller
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import loading
from common import UserError
from loading import load_checkpoint, load_distiller
from paper.summary import read_results
from serving.vectors import read_vectors
from sources import headers
from sources.own import columns_of, examples_in
from sources.tasks import read_examples, require_options

many = settings(max_examples=int(os.environ.get("FUZZ", "100")), deadline=None, derandomize=True,
                database=None, suppress_health_check=list(HealthCheck))
text = st.text(max_size=8) | st.sampled_from(["", " ", "happy", "sad", "\ud800", "\0", "a\u2028b", "z" * 3000,
                                              "../../x", "/etc/x"])
scalar = st.none() | st.booleans() | st.integers() | st.floats() | text | \
    st.sampled_from([0, -1, 1e9, 10 ** 12, 10 ** 30, 1e400])
value = st.recursive(scalar, lambda v: st.lists(v, max_size=3) | st.dictionaries(text, v, max_size=3),
                     max_leaves=6)
GOOD = {"task": "t", "input": "a b", "output": "happy", "options": ["happy", "sad"]}


@st.composite
def lines(draw, good: dict = GOOD) -> bytes:
    """A file of up to three lines: good ones, ones with other fields, and what is no object or no JSON."""
    made = []
    for _ in range(draw(st.integers(0, 3))):
        row = good | draw(st.dictionaries(st.sampled_from([*good, "more"]), value, max_size=2))
        row.pop(draw(st.sampled_from([*good, *"abcdefgh"])), None)
        line = json.dumps(draw(st.sampled_from([row] * 4 + [good] * 4) | value)).encode()
        line = line[:draw(st.sampled_from([len(line)] * 9 + [9]))]
        made.append(draw(st.sampled_from([line] * 9 + [b"\xff\xfe", b"{", b"\0", b"[" * 3000])))
    return draw(st.sampled_from([b"\n", b"\r\n", b"\n\n"])).join(made)


def said(data: bytes) -> list[dict]:
    return [json.loads(line) for line in data.decode().split("\n") if line.strip()]


def stripped(row: dict, *names: str) -> list:
    return [str(row[name]).strip() for name in names] + [[o.strip() for o in row.get("options") or []]]


@many
@given(lines())
def test_lines_of_tasks_and_of_ones_own(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "t.jsonl"
    path.write_bytes(data)
    for kind in ("tasks", "own"):
        try:
            if kind == "tasks":
                found = read_examples(path)
                require_options(found, lambda option: list(option.encode(errors="surrogatepass")))
            else:
                found = examples_in("t", path, columns_of(None))
        except UserError as error:
            assert str(path) in str(error)
        else:
            event(f"{kind}: read")
            assert [stripped(e, "input", "output") for e in found] == \
                [stripped(row, "input", "output") for row in said(data)]


RESULT = {"method": "icl", "task": "t", "seed": 100, "headline": 0.5, "n": 8, "k": 16, "demo_tokens": 90,
          "trained_on": {"finetune": {"lam": 1.0}}, "checkpoint": None}


@many
@given(lines(RESULT))
def test_lines_of_results(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "r.jsonl"
    path.write_bytes(data)
    try:
        found = read_results(path, "method", "task", "seed", "headline")
    except UserError as error:
        assert str(path) in str(error)
    else:
        event("read")
        rows = [row for row in data.split(b"\n") if row.strip()]
        if len(found) < len(rows):  # a last line that is none is what a kill leaves
            with pytest.raises((ValueError, RecursionError)):
                json.loads(rows.pop())
        assert json.dumps(found) == json.dumps([json.loads(row) for row in rows])
        for row in found:
            assert 0 <= row["headline"] <= 1 and isinstance(row["seed"], int) and isinstance(row["task"], str)


def places(tree: dict, at: tuple = ()) -> list[tuple]:
    """The path to every field of a tree of objects."""
    return [p for name, v in tree.items()
            for p in [(*at, name), *(places(v, (*at, name)) if isinstance(v, dict) else [])]]


@st.composite
def changed(draw, tree: dict) -> dict:
    """A header with one to three fields gone, or of another value."""
    copy = json.loads(json.dumps(tree))
    for place in draw(st.lists(st.sampled_from(places(tree)), min_size=1, max_size=3, unique=True)):
        at = copy
        for name in place[:-1]:
            at = at.get(name) if isinstance(at, dict) else None
        if isinstance(at, dict):
            at.pop(place[-1], None)
            at |= draw(st.just({}) | value.map(lambda v, name=place[-1]: {name: v}))
    return copy


def holds(found, header) -> bool:
    """Whether all that a header says is there, beside what it leaves out."""
    if isinstance(header, dict):
        return all(name in found and holds(found[name], v) for name, v in header.items())
    return found == header


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, setting) -> Path:
    state = {"trained_on": {"pretrain": {"corpus": "c", "objective": "kl", "beta": 0.8},
                            "finetune": {"tasks": "metaicl", "split": "qa_to_qa", "lam": 1.0}},
             "metrics": {"recovered": 0.5}, "flags": {"steps": 3}, "step": 3}
    folder = tmp_path_factory.mktemp("run")
    return save_distiller(folder, make_distiller(setting.llm), setting.llm, **state) / "best.safetensors"


@many
@given(st.data())
def test_headers_of_checkpoints(checkpoint, setting, tmp_path_factory, data):
    tensors, state = load_checkpoint(checkpoint)
    header, path = data.draw(changed(state)), tmp_path_factory.getbasetemp() / "c.safetensors"
    save_file(tensors, path, metadata={"state": json.dumps(header)})
    try:
        distiller, found = load_distiller(path, setting.llm)
        method = headers.method_of(found)
    except UserError as error:
        assert str(path) in str(error)
    else:
        event(f"read as {method}")
        assert holds(found, header)
        assert all(torch.equal(t, tensors[f"distiller.{n}"]) for n, t in distiller.state_dict().items())


@many
@given(st.data())
def test_headers_of_vectors(setting, tmp_path_factory, data):
    path, vectors = tmp_path_factory.getbasetemp() / "v.safetensors", torch.arange(128.0).view(4, 32)
    about = {"llm": loading.identity(setting.llm), "checkpoint": "run/best@0", "method": "mend",
             "template": "space", "demonstrations": 2, "tokens": 9, "labels": ["happy", "sad"]}
    header = data.draw(changed(about))
    save_file({"vectors": vectors}, path, metadata={"about": json.dumps(header)})
    try:
        found, read = read_vectors(str(path), setting.llm)
    except UserError as error:
        assert str(path) in str(error)
    else:
        event("read")
        assert torch.equal(found, vectors) and holds(read, header)


@many
@given(st.data())
def test_damaged_bytes(checkpoint, setting, tmp_path_factory, data):
    """A checkpoint that is cut, or in which bytes have changed: refused, or, where only weights changed,
    read as they stand."""
    whole, path = checkpoint.read_bytes(), tmp_path_factory.getbasetemp() / "d.safetensors"
    cut = data.draw(st.integers(0, len(whole)) | st.just(len(whole)))
    damaged = bytearray(whole[:cut])
    for at in data.draw(st.lists(st.integers(0, max(0, cut - 1)) | st.integers(0, min(2000, max(0, cut - 1))),
                                 max_size=3)):
        damaged[at:at + 1] = bytes([data.draw(st.integers(0, 255))])[:1] if cut else b""
    path.write_bytes(bytes(damaged))
    try:
        distiller, state = load_distiller(path, setting.llm)
    except UserError as error:
        assert str(path) in str(error) or "not finite" in str(error)
    else:
        event("read")
        assert len(damaged) == len(whole) and state["model"]["distill_len"] == distiller.distill_len
