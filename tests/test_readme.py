"""What the README and the documents say of the code holds: commands, names, figures, links and files."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

import bench
import common
import data
import distill
import evaluate
import paper.summary
import train_finetune
import train_pretrain
from paper import attention, carried, choose, collection, figures, held_out, probe, swaps, tables
from sources import assets

SCRIPTS = {m.__name__: m for m in (assets, attention, bench, carried, choose, data, distill, evaluate,
                                   figures, held_out, probe, swaps, train_finetune, train_pretrain)}
DOCUMENTS = ["README.md", "results/LOG.md", "results/SPEED.md", "checkpoints/README.md",
             *sorted(f"docs/{path.name}" for path in (common.ROOT / "docs").glob("*.md"))]
RUNS = sorted(f"paper/runs/{path.name}" for path in (common.ROOT / "paper" / "runs").glob("*.sh"))
PLACES = [*DOCUMENTS, "Makefile", *(f"{name.replace('.', '/')}.py" for name in SCRIPTS)]
CALLED = {f"-m {name}" if "." in name else f"{name}.py": script for name, script in SCRIPTS.items()}
CALLED["data.py"] = collection  # whose parser it is
VARIABLES = {"$(DEMO)": "out/demo", "$(PUBLISHED)": "x.safetensors",
             "$(NEWLINE)": "", "$(MADE)": "--preset pocket --tasks functions",
             "$(SMALL)": "--distiller kv:32", "$(TABLE)": "--seeds 100",
             "$(if $(filter gemma,$(LLM)),--only gemma)": "", "$": ""}
MODULES = [path.stem for path in common.ROOT.glob("*.py")] + ["paper", "serving", "sources"]


def read(place: str) -> str:
    return (common.ROOT / place).read_text(encoding="utf-8")


def commands() -> list[str]:
    scripts, found = "|".join(map(re.escape, CALLED)), []
    for place in PLACES:
        text = read(place).replace("\\\n", " ")
        found += re.findall(rf"((?:python|nproc_per_node \d+) (?:{scripts})(?![.\w])[^\n`#|]*)", text)
    return sorted(set(found))


def names() -> list[str]:
    """Every `module.name` of ours between backticks; the log's are those of its own time."""
    text = " ".join(read(place) for place in DOCUMENTS if place != "results/LOG.md")
    found = re.findall(rf"`((?:{'|'.join(MODULES)})(?:\.[A-Za-z_]\w*)+)`", text)
    return sorted({name for name in found if not name.endswith((".py", ".json", ".md"))})


def test_commands_are_found():
    text = " ".join(commands())
    assert all(called in text for called in CALLED) and len(commands()) > 12


def test_the_two_commands_of_the_method_stand_in_the_readme_as_they_are():
    for command in ("train_pretrain.py --beta 0.8", "train_finetune.py --split non_para_to_para"):
        assert re.search(rf"^python {command} *(#.*)?$", read("README.md"), re.MULTILINE), command


@pytest.mark.parametrize("command", commands())
def test_command_parses(command):
    called, flags = re.search(rf"({'|'.join(map(re.escape, CALLED))})(.*)", command).groups()
    for variable, value in VARIABLES.items():
        flags = flags.replace(variable, value)
    args = CALLED[called].get_parser().parse_args(shlex.split(flags))
    if "split" in args:
        assert args.split in (*common.SPLITS, common.FUNCTIONS, "S")


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_a_script_calls_its_main_after_all_it_needs_is_defined(script):
    last = ast.parse(Path(script.__file__).read_text()).body[-1]
    assert isinstance(last, ast.If) and ast.unparse(last.test) == "__name__ == '__main__'"


def test_the_readme_is_read_in_one_sitting():
    assert len(read("README.md").splitlines()) <= 200


@pytest.mark.parametrize("path", [*DOCUMENTS, "results/attacks.md", "results/features.md"])
def test_lines_of_documents_are_short(path):
    """But a table's row, a link's address and a command, which cannot be cut."""
    in_code = False
    for line in read(path).splitlines():
        in_code ^= line.startswith("```")
        whole = line.startswith(("|", "![")) or "](http" in line or re.search("`[^`]{80,}`", line)
        assert len(line) <= 110 or in_code or whole, line


@pytest.mark.parametrize("path", ["Makefile", *RUNS])
def test_lines_of_scripts_are_short(path):
    assert [line for line in read(path).splitlines() if len(line) > 110] == []


def test_the_equation_table_names_both_the_page_and_the_code():
    text = read("README.md")
    assert {"plain.distill_loss", "score.distill_loss", "model.Distiller.forward", "score.pred_loss",
            "score.score_options", "data.Corpus.row"} <= {*re.findall(r"`([\w.]+)`", text)} & {*names()}


def test_the_packed_row_is_what_collate_makes():
    queries = [(x, [[6], [7, 8]]) for x in ([4, 5], [9, 10])]
    batch = data.collate([{"demo": [1, 2, 3], "queries": queries}])
    for field in ("query", "branch", "position", "predictor"):
        (row,) = re.findall(rf"^\| `{field}`[^|]*\|(.*)\|$", read("README.md"), re.MULTILINE)
        assert [int(cell) for cell in row.split("|")] == batch[field][0].tolist(), field


@pytest.mark.parametrize("name", names())
def test_a_name_of_the_documents_exists(name):
    parts = name.split(".")
    deep = 2 if parts[0] in ("paper", "serving", "sources") else 1
    found = importlib.import_module(".".join(parts[:deep]))
    for part in parts[deep:]:
        found = getattr(found, part)


@pytest.mark.parametrize("place", DOCUMENTS)
def test_links_lead_somewhere(place):
    folder = (common.ROOT / place).parent
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", read(place)):
        path = folder / target if target else common.ROOT / place
        assert path.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in anchors, f"{target}#{anchor}"


@pytest.mark.parametrize("place", DOCUMENTS)
def test_files_that_are_named_are_there(place):
    for name in re.findall(r"`((?:results|runs|paper|docs|tests|checkpoints)/[\w./-]+\.\w+)`", read(place)):
        assert (common.ROOT / name).exists(), name


def test_the_tests_that_are_named_are_there():
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", read("docs/families.md"))
    assert len(named) >= 8
    for file, test in named:
        assert f"def {test}(" in read(f"tests/{file}"), test


@pytest.mark.parametrize("file, places", [("table2-pocket-gpu.jsonl", ["docs/results.md"]),
                                          ("table2-pocket.jsonl", ["docs/results.md"])])
def test_the_documents_have_the_figures_of_the_committed_results(file, places):
    records = paper.summary.read_results(common.ROOT / "results" / file)
    for method in sorted({r["method"] for r in records}):
        headline, accuracy = (tables.summary({(r["task"], r["seed"]): (100 * r[name], r["n"])
                                              for r in records if r["method"] == method})
                              for name in ("headline", "accuracy"))
        for place in places:
            rows = [line for line in read(place).splitlines() if line.startswith("|")]
            cell = f"| {headline['mean']:.2f}" + (f" ±{headline['std']:.2f}" if headline["std"] else "")
            assert any(cell in row for row in rows), (place, method)
            assert any(f"| {accuracy['mean']:.1f} |" in row for row in rows), (place, method)


@pytest.mark.parametrize("name, length", [
    ("ratios-functions", 16), ("ratios-functions", 8), ("ratios-recall", 32), ("ratios-recall", 16),
    ("ratios-early", 16), ("class_to_class-kv", 64), ("hr_to_lr-kv", 64),
    ("bigbench-functions", 64)])
def test_the_readme_has_the_figures_of_what_the_vectors_carry(name, length):
    made = carried.carried(paper.summary.read_results(common.ROOT / "results" / f"{name}.jsonl"))
    cells = {m: f"{row['mean']:.1f}" for m, row in made["methods"][length].items() if m != "majority"}
    tasks = made["methods"][length]["mend"]["tasks"]
    (row,) = [line for line in read("README.md").splitlines()
              if f" {tasks} | {made['tokens']:.0f} → {length} |" in line]
    shown = re.findall(r"\d+\.\d", row)
    wanted = ("zero_shot", "last_l", "icl_budget", "mend_swapped", "mend_constant", "mend", "icl")
    assert shown == [cells[m] for m in wanted if m in cells]


@pytest.mark.parametrize("name", ["ratios-functions", "ratios-recall", "ratios-early", "class_to_class-kv",
                                  "functions-sets", "recall-segments-4x8", "bigbench-functions",
                                  "class_to_class-segments-4x16", "hr_to_lr-kv"])
def test_the_results_page_has_their_whole_tables(name):
    made = carried.carried(paper.summary.read_results(common.ROOT / "results" / f"{name}.jsonl"))
    rows = [line for line in carried.table_lines(name, made)[3:] if line.startswith("| ")]
    if name.startswith("bigbench"):  # its intervals go by queries in common, which the assets have
        rows = [row.rpartition(" [")[0] or row for row in rows]
    assert [row for row in rows if row not in read("docs/results.md")] == []
    assert len(rows) >= 6


def test_the_results_page_has_recall_in_segments():
    records = [r for name in ("equal", "4x8") for r in paper.summary.read_results(
        common.ROOT / "results" / f"recall-segments-{name}.jsonl")]
    settings = {(r.get("segments") or 1, r["distill_len"]) for r in records}
    assert len(settings) >= 5
    for parts, length in settings:
        here = [r for r in records if (r.get("segments") or 1, r["distill_len"]) == (parts, length)]
        mend, swapped = (tables.summary(paper.summary.scores_of([r for r in here if r["method"] == m]))
                         for m in ("mend", "mend_swapped"))
        row = f"| {parts} x {length} | {parts * (length - 1) + 1} | " + " | ".join(
            f"{s['mean']:.1f} ±{s['std']:.1f}" for s in (mend, swapped)) + " |"
        assert row in read("docs/results.md"), row


def test_the_results_page_has_class_to_class_in_segments():
    records = [r for name in ("kv", "segments-4x16", "segments-equal") for r in paper.summary.read_results(
        common.ROOT / "results" / f"class_to_class-{name}.jsonl")]
    settings = {(r.get("segments") or 1, r["distill_len"], r["context_len"]) for r in records}
    assert len(settings) == 4
    for setting in settings:
        here = [r for r in records if (r.get("segments") or 1, r["distill_len"], r["context_len"]) == setting]
        mend, swapped = (tables.summary(paper.summary.scores_of([r for r in here if r["method"] == m]))
                         for m in ("mend", "mend_swapped"))
        parts, length, context = setting
        row = f"| {parts} x {length} | {parts * (length - 1) + 1} | {context} | " + " | ".join(
            f"{s['mean']:.1f} ±{s['std']:.1f}" for s in (mend, swapped)) + " |"
        assert row in read("docs/results.md"), row


def test_the_results_page_has_hr_to_lr_in_segments():
    made = carried.carried(paper.summary.read_results(common.ROOT / "results/hr_to_lr-segments-4x16.jsonl"))
    page = " ".join(read("docs/results.md").replace("−", "-").split())
    for method, row in made["methods"][16].items():
        if method in ("mend", "last_l", "icl", "mend_swapped"):
            assert f"{row['mean']:.1f}" in page.partition("hr_to_lr-segments-4x16.jsonl")[2][:400], method
        if method in ("last_l", "icl"):
            assert "({gap:+.1f} [{low:+.1f}, {high:+.1f}])".format(**row["gap"]) in page, method


def test_every_table_2_of_the_results_is_checked():
    assert [path.name for path in sorted((common.ROOT / "results").glob("table2-*.jsonl"))] == [
        "table2-pocket-gpu.jsonl", "table2-pocket.jsonl"]
