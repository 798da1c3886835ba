"""Tests of figures.py: what is drawn equals averages worked by hand; each command writes pictures; gaps are
told."""

import json
import shlex

import numpy as np
import pytest
import torch
from conftest import write_lines
from PIL import Image

from common import UserError
from paper import figures
from paper.figures import averages, main
from run import save_checkpoint


def record(method="mend", task="ag_news", seed=100, headline=0.5, k=16, distill_len=8, **more) -> dict:
    """A line as evaluate.py writes it."""
    return {"method": method, "checkpoint": None, "trained_on": None, "task": task, "seed": seed,
            "data_hash": "0", "llm": "tiny", "split": "class_to_class", "tasks": "metaicl", "k": k,
            "distill_len": distill_len, "context_len": 900, "template": "space", "retrieval": None,
            "perturbation": None, "limit": 0, "dtype": "fp32", "n": 10, "macro_f1": headline,
            "accuracy": headline, "headline": headline, "commit": "abc", "date": ""} | more


def grid(values: dict, **more) -> list[dict]:
    """Records of two tasks and two seeds: values is {(task, seed): headline}."""
    return [record(task=task, seed=seed, headline=value, **more) for (task, seed), value in values.items()]


# per seed: means over tasks 30 and 50 -> 40 ± 10 sqrt 2; per task the deviation is another
HAND = {("ag_news", 100): 0.2, ("emo", 100): 0.4, ("ag_news", 13): 0.7, ("emo", 13): 0.3}
MEAN, STD = 40.0, 10 * np.sqrt(2)


def shifted(by: float) -> dict:
    return {key: value + by / 100 for key, value in HAND.items()}


def drawn_lines(ax) -> dict:
    """{label: (x, y, half of each error bar)} of an axes' plots, all of them inside its limits."""
    for container in ax.containers:
        ends = np.concatenate(container[2][0].get_segments())
        for values, (low, high) in zip(ends.T, (ax.get_xlim(), ax.get_ylim()), strict=True):
            assert low < values.min() and values.max() < high
    return {c.get_label(): (c[0].get_xdata().tolist(), c[0].get_ydata().tolist(),
                            [(s[1, 1] - s[0, 1]) / 2 for s in c[2][0].get_segments()]) for c in ax.containers}


def draw(name: str, *argv: str):
    """A figure's drawing function, on flags: (figure, what it draws)."""
    args = figures.get_parser().parse_args([name, *argv])
    args.command = "python -m paper.figures " + name
    return figures.FIGURES[name](args)


def check_files(figures_dict, out, name) -> None:
    assert [str(out / f"{name}.{kind}") for kind in ("png", "svg")] == figures_dict["files"]
    pixels = np.asarray(Image.open(out / f"{name}.png").convert("L"))
    assert pixels.shape[1] >= 800 and 0.01 < (pixels < 200).mean() < 0.9  # neither blank nor black
    assert (out / f"{name}.svg").read_text().count("<path") > 20


def test_averages_by_hand():
    data = averages(grid(HAND, k=4) + grid(shifted(5), k=1) + grid(shifted(-10), k=4, method="icl"),
                    ("icl", "mend"), lambda r: r["k"])
    assert (data["tasks"], data["seeds"], data["queries"]) == (2, 2, 40)
    np.testing.assert_allclose(data["points"]["mend"], [[1, MEAN + 5, STD], [4, MEAN, STD]])
    np.testing.assert_allclose(data["points"]["icl"], [[4, MEAN - 10, STD]])


def test_incomplete_points_and_absent_methods_are_left_out_and_told(capsys):
    data = averages(grid(HAND, k=4) + grid(HAND, k=8)[:3], ("mend", "icl"), lambda r: r["k"])
    np.testing.assert_allclose(data["points"]["mend"], [[4, MEAN, STD]])
    assert data["points"]["icl"] == []
    told = capsys.readouterr().out
    assert "mend at 8 has 3 of 4 (task, seed)" in told and "no complete records of icl" in told


@pytest.mark.parametrize(("field", "value"), [("llm", "other"), ("template", "newline"), ("limit", 5),
                                              ("dtype", "bf16")])
def test_settings_are_not_mixed(field, value):
    with pytest.raises(UserError, match=field):
        averages(grid(HAND, k=4) + grid(HAND, k=8, **{field: value}), ("mend",), lambda r: r["k"])


def test_of_two_checkpoints_at_one_point_the_newest_counts():
    old, new = grid(shifted(7), checkpoint="run/best@1"), grid(HAND, checkpoint="run/best@2")
    assert averages(old + new, ("mend",), lambda r: r["k"]) == averages(new, ("mend",), lambda r: r["k"])
    assert averages(new + old, ("mend",), lambda r: r["k"]) != averages(new, ("mend",), lambda r: r["k"])


def fig4_records() -> list[dict]:
    over_k = [r for m, shift in (("icl", 0), ("hypertuning", 5), ("mend", 10))
              for i, k in enumerate((1, 2, 16)) for r in grid(shifted(shift + i), method=m, k=k)]
    over_l = [r for m, shift in (("prompt_tuning", 0), ("hypertuning", 2), ("mend", 4))
              for i, length in enumerate((1, 4, 20, 40))
              for r in grid(shifted(shift + i), method=m, distill_len=length)]
    elsewhere = grid(shifted(20), split="qa_to_qa") + grid(shifted(20), retrieval="bm25") + \
        grid(shifted(20), perturbation="no_label")
    return over_k + over_l + elsewhere


def test_fig4_draws_the_means_and_deviations(tmp_path):
    path = write_lines(tmp_path / "fig4.jsonl", fig4_records())
    fig, data = draw("fig4", "--results", path)
    over_k, over_l = map(drawn_lines, fig.axes)
    assert set(over_k) == {"MEND", "Vanilla ICL", "HyperTuning"}
    assert set(over_l) == {"MEND", "HyperTuning", "PromptTuning"}
    # the points at l = 8 in (b) are those at K = 16 in (a)
    expected = [(over_k, "Vanilla ICL", [1, 2, 16], [0, 1, 2]),
                (over_k, "HyperTuning", [1, 2, 16], [5, 6, 7]), (over_k, "MEND", [1, 2, 16], [10, 11, 12]),
                (over_l, "PromptTuning", [1, 4, 20, 40], [0, 1, 2, 3]),
                (over_l, "HyperTuning", [1, 4, 8, 20, 40], [2, 3, 7, 4, 5]),
                (over_l, "MEND", [1, 4, 8, 20, 40], [4, 5, 12, 6, 7])]
    for lines, label, xs, shifts in expected:
        x, y, half = lines[label]
        assert x == xs
        np.testing.assert_allclose(y, MEAN + np.array(shifts))
        np.testing.assert_allclose(half, [STD] * len(xs))
    text = fig.texts[0].get_text().replace("\n", " ")
    for part in ("2 tasks × 2 seeds, 40 queries a point", "runs/fig4.sh", "python -m paper.figures fig4"):
        assert part in text
    assert "($l$ = 8)" in fig.axes[0].get_xlabel() and "($K$ = 16)" in fig.axes[1].get_xlabel()
    out = main(["fig4", "--results", path, "--out", str(tmp_path / "out")])
    check_files(out, tmp_path / "out", "fig4")
    assert out["drawn"] == data and list(data) == ["fig4a", "fig4b"]


def ablation_records() -> list[dict]:
    def trained(objective, beta=0.8, gamma=1.0, **finetune) -> dict:
        return {"pretrain": {"objective": objective, "beta": beta, "gamma": gamma}} | (
            {"finetune": {"tasks": "metaicl", **finetune}} if finetune else {})

    records = []
    for i, beta in enumerate((0.1, 0.5, 0.8, 0.9)):
        records += grid(shifted(i), trained_on=trained("kl", beta=beta))
    for i, gamma in enumerate((0.1, 1.0, 10.0)):
        records += grid(shifted(10 + i), trained_on=trained("clm+kl", gamma=gamma))
    for i, lam in enumerate((0.01, 0.1, 1, 10)):
        records += grid(shifted(20 + i), trained_on=trained("kl", lam=lam, pred_weight=1.0))
    others = [trained("clm"), trained("clm", lam=1, pred_weight=1.0), trained("kl", lam=1, pred_weight=0.0),
              trained("kl", lam=0, pred_weight=1.0), None,
              {"finetune": {"tasks": "metaicl", "lam": 1, "pred_weight": 1.0}}]
    return records + [r for other in others for r in grid(shifted(25), trained_on=other)]


def test_fig6_and_fig7_choose_their_checkpoints(tmp_path):
    path = write_lines(tmp_path / "ablations.jsonl", ablation_records())
    expected = {"fig6": [([0.1, 0.5, 0.8, 0.9], 0), ([0.1, 1, 10], 10)], "fig7": [([0.01, 0.1, 1, 10], 20)]}
    for name, panels in expected.items():
        fig, _ = draw(name, "--results", path)
        for ax, (xs, shift) in zip(fig.axes, panels, strict=True):
            (x, y, half), = drawn_lines(ax).values()
            assert x == xs
            np.testing.assert_allclose(y, [MEAN + shift + i for i in range(len(xs))])
            np.testing.assert_allclose(half, [STD] * len(xs))
        check_files(main([name, "--results", path, "--out", str(tmp_path)]), tmp_path, name)


@pytest.mark.parametrize(("name", "script"), [("fig4", "fig4.sh"), ("fig6", "ablations.sh"),
                                              ("fig7", "ablations.sh")])
def test_an_empty_file_names_the_script_that_fills_it(tmp_path, name, script):
    for path in (tmp_path / "absent.jsonl", tmp_path / "empty.jsonl"):
        (tmp_path / "empty.jsonl").touch()
        with pytest.raises(UserError, match=f"run paper/runs/{script}"):
            main([name, "--results", str(path), "--out", str(tmp_path)])


# Figs. 5 and 8
ABOUT = {"llm": "tiny", "seed": 100, "dtype": "fp32", "commit": "abc", "command": "python -m paper.attention"}


def test_fig8_draws_the_scores(tmp_path):
    scores = np.random.default_rng(0).random((5, 3)).round(4)
    heads = [[4, 0], [2, 1], [0, 2], [1, 1]]
    path = tmp_path / "induction.json"
    path.write_text(json.dumps(ABOUT | {"sequences": 10, "length": 500, "heads": heads,
                                        "scores": scores.tolist()}))
    fig, _ = draw("fig8", "--results", str(path))
    ax = fig.axes[0]
    np.testing.assert_array_equal(ax.images[0].get_array(), scores.T)  # layers along x, heads along y
    assert [[r.get_x() + 0.5, r.get_y() + 0.5] for r in ax.patches] == heads
    assert f"layer 4 head 0 ({scores[4, 0]:.2f})" in fig.texts[0].get_text().replace("\n", " ")
    check_files(main(["fig8", "--results", str(path), "--out", str(tmp_path)]), tmp_path, "fig8")


def test_fig5_draws_the_weights(tmp_path):
    rng = np.random.default_rng(0)
    rows = {m: {"prefix": rng.random((4, n)).tolist(), "query": rng.random((4, 6)).tolist()}
            for m, n in (("icl", 20), ("mend", 8))}
    path = tmp_path / "attention.json"
    path.write_text(json.dumps(ABOUT | rows | {
        "checkpoint": "run/best@1", "trained_on": {"pretrain": {}}, "step": 10, "task": "ag_news",
        "data_hash": "0", "example": 3, "k": 16, "demo_tokens": 300, "distill_len": 8,
        "heads": [[1, 0], [1, 1], [2, 0], [2, 3]], "query_tokens": list("abcdef")}))
    fig, _ = draw("fig5", "--results", str(path))
    for ax, method in zip(fig.axes, ("icl", "mend"), strict=False):
        query, prefix = ax.images
        np.testing.assert_array_equal(prefix.get_array(), rows[method]["prefix"])
        np.testing.assert_array_equal(query.get_array(), rows[method]["query"])
        assert prefix.get_extent()[1] < query.get_extent()[0]
        assert query.get_extent()[:2] == [20.5, 26.5]  # the query stands at the same place under both
    assert [t.get_text() for t in fig.axes[1].get_xticklabels()] == list("abcdef")
    assert fig.axes[1].get_xticks().tolist() == list(range(21, 27))
    check_files(main(["fig5", "--results", str(path), "--out", str(tmp_path)]), tmp_path, "fig5")


@pytest.mark.parametrize("name", ["fig5", "fig8"])
def test_what_was_not_measured_names_its_script(tmp_path, name):
    with pytest.raises(UserError, match=r"does not hold what fig. draws .*python -m paper\.attention"):
        main([name, "--results", str(tmp_path / "absent.json"), "--out", str(tmp_path)])


@pytest.mark.parametrize(("argv", "message"), [
    (["fig3", "--results", "F"], "it lacks settings, scaling.*bench.py"),
    (["fig8", "--results", "F"], "it lacks scores, heads.*paper.attention"),
    (["fig4", "--results", "F"], "the results lack checkpoint, .*lines that evaluate.py wrote"),
    (["fig8", "--results", "F", "F"], "fig8 takes one file"),
    (["method", "--out", "F/x"], "stands under a file")])
def test_files_of_another_kind_are_named(tmp_path, argv, message):
    (tmp_path / "F").write_text('{"task": "emo"}')
    argv = [str(tmp_path / a) if a[0] == "F" else a for a in argv]
    with pytest.raises(UserError, match=message):
        main(argv if "--out" in argv else [*argv, "--out", str(tmp_path)])


def write_run(folder, trained_on: dict, lines: list[dict]) -> str:
    folder.mkdir()
    write_lines(folder / "metrics.jsonl", lines)
    save_checkpoint(folder / "last.safetensors", torch.nn.Linear(1, 1),
                    {"trained_on": trained_on, "flags": {"steps": 160, "eval_docs": 64}, "commit": "abc"})
    return str(folder)


def test_curves(tmp_path):
    steps = range(1, 81)  # so the mean is over two steps
    pretraining = [{"step": s, "kl": float(s), "grad_norm": 1.0}
                   for s in steps] + [{"step": s, "dev_option_ce": 1.0, "heldout_kl": 2 / s,
                                       "heldout_kl_no_context": 1.5,
                                       "heldout_kl_last_l": 0.5, "recovered": 1 - 2 / s / 1.5, "dev_kl": 1.0}
                                      for s in (40, 80)]
    finetuning = [{"step": s, "pred": 2.0 * s, "kl": 1.0} for s in steps] + [
        {"step": s, "dev_pred": 3 / s, "dev_option_ce": 1.0, "dev_headline": 0.01 * s} for s in (40, 80)]
    clm = [{"step": s, "clm": 1.0} for s in steps]
    runs = [write_run(tmp_path / "pre", {"pretrain": {}}, pretraining),
            write_run(tmp_path / "fine", {"pretrain": {}, "finetune": {}}, finetuning),
            write_run(tmp_path / "clm", {"pretrain": {}}, clm)]
    fig, _ = draw("curves", *runs)
    kl, recovered, answer, headline, clm_kl, _ = fig.axes
    lines = {line.get_label(): line.get_ydata() for line in kl.lines}
    np.testing.assert_allclose(lines["training"], [1, *(s - 0.5 for s in steps[1:])])
    np.testing.assert_allclose(lines["held out"], [2 / 40, 2 / 80])
    assert set(lines["no context"]) == {1.5} and set(lines["last $l$ tokens"]) == {0.5}
    np.testing.assert_allclose(recovered.lines[0].get_ydata(), [100 - 200 / s / 1.5 for s in (40, 80)])
    np.testing.assert_allclose(recovered.lines[0].get_xdata(), [40, 80])
    np.testing.assert_allclose(answer.lines[0].get_ydata(), [2, *(2 * s - 1 for s in steps[1:])])
    np.testing.assert_allclose(answer.lines[1].get_ydata(), [3 / 40, 3 / 80])
    np.testing.assert_allclose(headline.lines[0].get_ydata(), [40, 80])
    assert not clm_kl.lines  # its loss is no KL
    text = fig.texts[0].get_text().replace("\n", " ")
    assert text.count("80 of 160 steps") == 3 and text.count("64 held-out windows") == 2
    check_files(main(["curves", *runs, "--out", str(tmp_path)]), tmp_path, "curves")


@pytest.mark.parametrize("argv", ["curves", "method out/run", "fig4 --split class_to_clas"])
def test_faulty_flags(argv, tmp_path):
    with pytest.raises(UserError):
        main([*shlex.split(argv), "--out", str(tmp_path)])

