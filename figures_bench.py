"""The pictures of what the methods cost: Fig. 3 and scaling, from the results of `bench.py --fig3`.

    python figures_bench.py --results results/fig3.json --out-dir results
"""

import argparse
import json
from pathlib import Path

from common import UserError, finish, run_main

# Okabe and Ito's colours, told apart with any colour vision; each method also has a hatch or a line style of its own
STYLES = {"icl": ("vanilla ICL", "#000000", "", "-"), "icl_cached": ("ICL, cached", "#56B4E9", "//", "--"),
          "prompt_tuning": ("PromptTuning; MEND, stored vectors", "#E69F00", "..", ":"), "mend": ("MEND, distilling each time", "#D55E00", "", "-"),
          "mend_kv": ("MEND, stored keys and values", "#009E73", "\\\\", "--")}
AXES = {"demo_tokens": "demonstration tokens", "distill_len": "l, distilled vectors"}
SPLITS = {"class_to_class": "Class→\nClass", "hr_to_lr": "HR→\nLR", "qa_to_qa": "QA→\nQA",
          "non_nli_to_nli": "non-NLI\n→NLI", "non_para_to_para": "non-Para\n→Para"}


def fig3(results: dict, out_dir: Path) -> list[Path]:
    """Fig. 3: FLOPs and peak memory counted for both GPT-2s, and time where it was measured."""
    import matplotlib.pyplot as plt
    llms = [name for name in ("gpt2-large", "gpt2-xl") if any(s["llm"] == name for s in results["settings"])]
    counted = {name: [s for s in results["settings"] if s["llm"] == name] for name in llms}
    panels = [(f"{name}: TFLOP a query", [s["rows"] for s in counted[name]], "query_flops", 1e12) for name in llms]
    panels += [(f"{name}: peak memory, GB", [s["rows"] for s in counted[name]], "peak_bytes", 1e9) for name in llms]
    if measured := results.get("measured"):
        panels.append((f"{measured[0]['llm']}: seconds a query, CPU" if "cores" in results["machine"] else
                       f"{measured[0]['llm']}: seconds a query, GPU", [m["rows"] for m in measured], "seconds", 1))
    figure, axes = plt.subplots((len(panels) + 1) // 2, 2, figsize=(9, 2.9 * ((len(panels) + 1) // 2)), squeeze=False)
    for axis, (title, points, key, unit) in zip(axes.flat, panels, strict=False):
        for i, (method, (label, colour, hatch, _)) in enumerate(STYLES.items()):
            left = [x + 0.16 * (i - 2) for x in range(len(points))]
            axis.bar(left, [rows[method][key] / unit for rows in points], 0.16, color=colour,
                     hatch=hatch, edgecolor="white", linewidth=0.3, label=label)
        axis.set_title(title, fontsize=11)
        axis.set_xticks(range(len(points)), [SPLITS[s["split"]] for s in counted[llms[0]]], fontsize=9)
    for axis in axes.flat[len(panels):]:
        axis.axis("off")
    return save(figure, out_dir / "fig3", results)


def scaling(results: dict, out_dir: Path) -> list[Path]:
    """FLOPs of a query against demonstration length and against l, with the points where curves cross."""
    import matplotlib.pyplot as plt
    llms = results["scaling"]
    figure, axes = plt.subplots(len(llms), 2, figsize=(9, 3 * len(llms)), squeeze=False)
    for row, llm in zip(axes, llms, strict=True):
        for axis, (key, label) in zip(row, AXES.items(), strict=True):
            curves = llm[key]
            for method, (name, colour, _, style) in STYLES.items():
                y = [f / 1e12 for f in curves["flops"][method]]
                axis.plot(curves["x"], y, style, color=colour, label=name, linewidth=2)
            for pair, below in (("icl and mend", -13), ("icl_cached and mend_kv", 5)):
                if (at := curves["crossings"].get(pair)) is not None:
                    y = interpolate(curves["x"], curves["flops"][pair.split(" and ")[0]], at) / 1e12
                    axis.plot(at, y, "o", color="white", markeredgecolor="black", markersize=8, zorder=5)
                    axis.annotate(f"{at:.0f}", (at, y), textcoords="offset points", xytext=(7, below), fontsize=10)
            axis.set_title(llm["llm"], fontsize=11)
            axis.set_xlabel(label, fontsize=10)
            axis.set_ylabel("TFLOP a query", fontsize=10)
            axis.set_yscale("log")
    return save(figure, out_dir / "scaling", results)


def interpolate(x: list[float], y: list[float], at: float) -> float:
    i = next(i for i in range(len(x) - 1) if at <= x[i + 1])
    return y[i] + (y[i + 1] - y[i]) * (at - x[i]) / (x[i + 1] - x[i])


def save(figure, path: Path, results: dict) -> list[Path]:
    """Write path.png and path.svg, with the command and commit that made the figures below."""
    figure.text(0.01, 0.002, f"{results['command']} · {results['commit']} · {results['query_tokens']} query tokens, "
                f"l = {results['distill_len']}, batch 1; counted in 16 bit", fontsize=8)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="upper center", ncols=3, fontsize=11)
    figure.tight_layout(rect=(0, 0.02, 1, 1 - 0.6 / figure.get_figheight()))
    files = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
    for file in files:
        figure.savefig(file, dpi=150)
    return files


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results/fig3.json"), help="what bench.py --fig3 wrote")
    parser.add_argument("--out-dir", type=Path, default=Path("results"), help="folder for fig3 and scaling")
    return parser


def main(argv: list[str] | None = None) -> dict:
    args = get_parser().parse_args(argv)
    if not args.results.is_file():
        raise UserError(f"--results {args.results} does not exist; make it with `python bench.py --preset paper --fig3`")
    results = json.loads(args.results.read_text())
    import matplotlib
    matplotlib.use("Agg")
    return finish({"files": [str(f) for draw in (fig3, scaling) for f in draw(results, args.out_dir)]})


if __name__ == "__main__":
    run_main(main)
