"""The figures: drawn from results/ as PNG and SVG, each with a caption that says n and the command.

    python -m paper.figures method                             # our own: Figs. 1 and 2 in one
    python -m paper.figures fig3                               # what a query costs (Sec. 4.2)
    python -m paper.figures scaling                            # our own: FLOPs over demonstrations and over l
    python -m paper.figures fig4                               # over K and over l (Sec. 5.1)
    python -m paper.figures fig6                               # over beta and gamma (App. B)
    python -m paper.figures fig7                               # over lambda (App. B)
    python -m paper.figures fig5                               # attention of the induction heads (Sec. 5.3)
    python -m paper.figures fig8                               # which heads these are (App. C)
    python -m paper.figures ratios                             # our own: recovered gain over tokens a vector
    python -m paper.figures swaps                              # our own: whose vectors, whose queries
    python -m paper.figures curves out/pretrain out/finetune   # what training runs logged

Each function that draws returns the figure and the numbers in it. An average is a mean over tasks for each
seed, then mean and sample standard deviation over seeds; error bars are that deviation.
"""

import argparse
import json
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.transforms import offset_copy

import common
from common import UserError, check, finish, run_main
from paper import pictures
from paper.pictures import GREY, METHODS, STYLE, caption
from paper.summary import read_results, scores_of
from paper.tables import latest, require_fields, summary
from sources.files import whole

# what stands before the query in Fig. 3: label, colour, hatch of bars, style of lines
COSTS = {"icl": ("vanilla ICL", "#000000", "", "-"), "icl_cached": ("ICL, cached", "#56B4E9", "//", "--"),
         "prompt_tuning": ("PromptTuning; MEND, stored vectors", "#E69F00", "..", ":"),
         "mend": ("MEND, distilling each time", "#D55E00", "", "-"),
         "mend_kv": ("MEND, stored keys and values", "#009E73", "\\\\", "--")}
COST_SPLITS = {"class_to_class": "Class→\nClass", "hr_to_lr": "HR→\nLR", "qa_to_qa": "QA→\nQA",
               "non_nli_to_nli": "non-NLI\n→NLI", "non_para_to_para": "non-Para\n→Para"}
SCRIPTS = {"fig4": "paper/runs/fig4.sh", **dict.fromkeys(("fig6", "fig7"), "paper/runs/ablations.sh")}


# --------------------------------------------------------------------------------------------------
# Fig. 3 and scaling: what `bench.py --fig3` counted and timed


def load_json(args: argparse.Namespace, name: str, needs: tuple[str, ...], command: str) -> dict:
    """The one results file of a figure that is no table of evaluations; `command` makes it."""
    paths = args.results or [str(common.ROOT / "results" / name)]
    check((len(paths) == 1, f"--results {' '.join(paths)}: {args.name} takes one file"))
    try:
        record = json.loads(Path(paths[0]).read_text(encoding="utf-8"))
        is_object = isinstance(record, dict)
        if lacking := [key for key in needs if not (
                is_object and isinstance(record.get(key), list | dict) and record[key])]:
            raise ValueError(f"it lacks {', '.join(lacking)}")
        return record
    except (OSError, ValueError) as error:
        raise UserError(f"{paths[0]} does not hold what {args.name} draws ({error}); "
                        f"make it with {command}") from error


def load_costs(args: argparse.Namespace) -> dict:
    return load_json(args, "fig3.json", ("settings", "scaling"), "`python bench.py --preset paper --fig3`")


def cost_caption(fig: Figure, results: dict) -> None:
    """The legend above, and below the command and commit that made the figures."""
    fig.legend(*fig.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    caption(fig, f"{results['command']} · {results['commit']} · {results['query_tokens']} query tokens, "
                 f"l = {results['distill_len']}, batch 1; counted in 16 bit")


def fig3(args: argparse.Namespace) -> tuple[Figure, dict]:
    """Fig. 3: FLOPs and peak memory counted for both GPT-2s, and time where it was measured."""
    results = load_costs(args)
    llms = [name for name in ("gpt2-large", "gpt2-xl") if any(s["llm"] == name for s in results["settings"])]
    counted = {name: [s for s in results["settings"] if s["llm"] == name] for name in llms}
    panels = [(f"{name}: TFLOP a query", [s["rows"] for s in counted[name]], "query_flops", 1e12)
              for name in llms]
    panels += [(f"{name}: peak memory, GB", [s["rows"] for s in counted[name]], "peak_bytes", 1e9)
               for name in llms]
    if measured := results.get("measured"):
        panels.append((f"{measured[0]['llm']}: seconds a query, CPU" if "cores" in results["machine"] else
                       f"{measured[0]['llm']}: seconds a query, GPU", [m["rows"] for m in measured],
                       "seconds", 1))
    rows = (len(panels) + 1) // 2
    fig = Figure(figsize=(9, 2.9 * rows + 0.8), layout="constrained")
    axes = fig.subplots(rows, 2, squeeze=False)
    for axis, (title, points, key, unit) in zip(axes.flat, panels, strict=False):
        for i, (method, (label, colour, hatch, _)) in enumerate(COSTS.items()):
            left = [x + 0.16 * (i - 2) for x in range(len(points))]
            axis.bar(left, [costs[method][key] / unit for costs in points], 0.16, color=colour,
                     hatch=hatch, edgecolor="white", linewidth=0.3, label=label)
        axis.set_title(title, fontsize=11)
        axis.set_xticks(range(len(points)), [COST_SPLITS[s["split"]] for s in counted[llms[0]]], fontsize=9)
    for axis in axes.flat[len(panels):]:
        axis.axis("off")
    cost_caption(fig, results)
    return fig, {"panels": [title for title, *_ in panels]}


def scaling(args: argparse.Namespace) -> tuple[Figure, dict]:
    """FLOPs of a query against demonstration length and against l, with the points where curves cross."""
    results = load_costs(args)
    llms = results["scaling"]
    fig = Figure(figsize=(9, 3 * len(llms) + 0.8), layout="constrained")
    axes = fig.subplots(len(llms), 2, squeeze=False)
    for row, llm in zip(axes, llms, strict=True):
        for axis, (key, label) in zip(row, (("demo_tokens", "demonstration tokens"),
                                            ("distill_len", "l, distilled vectors")), strict=True):
            curves = llm[key]
            for method, (name, colour, _, style) in COSTS.items():
                y = [f / 1e12 for f in curves["flops"][method]]
                axis.plot(curves["x"], y, style, color=colour, label=name, linewidth=2)
            for pair, below in (("icl and mend", -13), ("icl_cached and mend_kv", 5)):
                if (at := curves["crossings"].get(pair)) is not None:
                    y = np.interp(at, curves["x"], curves["flops"][pair.split(" and ")[0]]) / 1e12
                    axis.plot(at, y, "o", color="white", markeredgecolor="black", markersize=8, zorder=5)
                    axis.annotate(f"{at:.0f}", (at, y), textcoords="offset points", xytext=(7, below),
                                  fontsize=10)
            axis.set_title(llm["llm"], fontsize=11)
            axis.set_xlabel(label, fontsize=10)
            axis.set_ylabel("TFLOP a query", fontsize=10)
            axis.set_yscale("log")
    cost_caption(fig, results)
    return fig, {llm["llm"]: {key: llm[key]["crossings"] for key in ("demo_tokens", "distill_len")}
                 for llm in llms}


# --------------------------------------------------------------------------------------------------
# Figs. 4, 6 and 7: the headline over one setting.


def load_records(args: argparse.Namespace) -> list[dict]:
    """The records of evaluate.py of one split, with MetaICL's own demonstrations, unperturbed."""
    paths = [Path(p) for p in args.results or sorted((common.ROOT / "results").glob(f"{args.name}*.jsonl"))]
    script = f"run {SCRIPTS[args.name]}, which makes it"
    check(*((path.is_file(), f"--results {path} is no file; {script}") for path in paths))
    records = [r for path in paths for r in read_results(path)]
    require_fields(records, args.name)
    chosen = [r for r in records if r["split"] == args.split and r["retrieval"] is None
              and r["perturbation"] is None]
    if not chosen:
        raise UserError(f"{', '.join(p.name for p in paths) or 'results/'}: {len(records)} records, none of "
                        f"--split {args.split} without retrieval and perturbation; {script}")
    return chosen


def most_varied(records: list[dict], hold: str, vary: str):
    """The value of field `hold` under which field `vary` takes most values (of several such, the largest)."""
    values = {r[hold] for r in records}
    return max(values, key=lambda v: (len({r[vary] for r in records if r[hold] == v}), v))


def averages(records: list[dict], methods: tuple[str, ...], x: Callable[[dict], float | None]) -> dict:
    """A panel's points: {"points": {method: [[x, mean, std], ...]}, "tasks", "seeds", "queries"}, in percent.

    A point that lacks some (task, seed) of the others would average over something else: it is left out, with
    a note. Raises UserError where records of different settings would be mixed.
    """
    groups = defaultdict(list)
    for r in records:
        if r["method"] in methods and x(r) is not None:
            groups[r["method"], x(r)].append(r)
    used = [r for group in groups.values() for r in group]
    settings = {f: {r[f] for r in used} for f in ("llm", "tasks", "template", "context_len", "limit",
                                                  "dtype")}
    check(*((len(values) <= 1, (f"records with {field} {' and '.join(sorted(map(str, values)))} cannot share "
                                "a panel; give --results a file with one of them"))
            for field, values in settings.items()))
    everything = {(r["task"], r["seed"]) for r in used}
    data = {"points": {m: [] for m in methods}, "tasks": len({t for t, _ in everything}),
            "seeds": len({s for _, s in everything}), "queries": 0}
    for (method, value), group in sorted(groups.items()):
        group = latest(group)
        here = {(r["task"], r["seed"]) for r in group}
        if here == everything:
            found = summary(scores_of(group))
            data["points"][method].append([value, found["mean"], found["std"]])
            data["queries"] = sum(r["n"] for r in group)
        else:
            print(f"note: {method} at {value} has {len(here)} of {len(everything)} (task, seed): left out")
    for method in [m for m, points in data["points"].items() if not points]:
        print(f"note: no complete records of {method}: its line is left out")
    return data


def draw_averages(args: argparse.Namespace, panels: list[tuple[str, str, dict]], records: list[dict],
                  what: str) -> tuple[Figure, dict]:
    """One panel for each (x label, x scale, averages)."""
    panels = [panel for panel in panels if len({x for points in panel[2]["points"].values()
                                                for x, _, _ in points}) > 1]
    check((panels, f"{args.name} needs two complete points; run {SCRIPTS[args.name]} to its end"))
    fig = Figure(figsize=(4.2 * len(panels) if len(panels) > 1 else 5.4, 4), layout="constrained")
    axes = fig.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    methods = [m for m in METHODS if any(data["points"].get(m) for *_, data in panels)]
    handles = {}
    for letter, ax, (xlabel, scale, data) in zip("ab", axes, panels, strict=False):
        ax.set_xscale(scale)
        here = [m for m in methods if data["points"].get(m)]
        for i, method in enumerate(here):
            colour, marker, label = METHODS[method]
            xs, means, stds = zip(*data["points"][method], strict=True)
            # side by side, so that no error bar hides another
            beside = offset_copy(ax.transData, fig, x=4 * i - 2 * (len(here) - 1), units="points")
            handles[label] = ax.errorbar(xs, means, yerr=stds, color=colour, marker=marker, label=label,
                                         capsize=3, elinewidth=1.2, transform=beside)
            ax.update_datalim([(x, mean + end) for x, mean, std in data["points"][method]
                               for end in (-std, std)])
        ax.margins(x=0.08)
        ticks = sorted({p[0] for points in data["points"].values() for p in points})
        ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
        ax.minorticks_off()
        ax.set_xlabel(xlabel)
        ax.set_title(f"({letter})" if len(panels) > 1 else "", loc="left")
        ax.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes[0].set_ylabel("headline, %" if len(handles) > 1 else f"headline of {next(iter(handles))}, %")
    if len(handles) > 1:
        fig.legend(handles.values(), handles, loc="outside upper center", ncols=len(handles),
                   columnspacing=1.2)
    n = "; ".join(dict.fromkeys(f"{d['tasks']} tasks × {d['seeds']} seeds, {d['queries']:,} queries a point"
                                for _, _, d in panels))
    order, commits = ", methods side by side" * (len(handles) > 1), sorted({r["commit"] for r in records})

    caption(fig, f"{what} {records[0]['llm']}, {args.split}, {n}. Headline: macro-F1 for classification, "
                 f"accuracy otherwise; mean over tasks, bars: standard deviation over seeds{order}.\n"
                 f"{SCRIPTS[args.name]}; {args.command} · commit {', '.join(commits)}")
    return fig, {f"{args.name}{letter}" if len(panels) > 1 else args.name: p[2]
                 for letter, p in zip("ab", panels, strict=False)}


def fig4(args: argparse.Namespace) -> tuple[Figure, dict]:
    """Fig. 4: (a) over K at one l, (b) over l at one K."""
    records = load_records(args)
    distill_len, k = most_varied(records, "distill_len", "k"), most_varied(records, "k", "distill_len")
    over_k = averages([r for r in records if r["distill_len"] == distill_len], ("icl", "hypertuning", "mend"),
                      lambda r: r["k"])
    over_l = averages([r for r in records if r["k"] == k], ("prompt_tuning", "hypertuning", "mend"),
                      lambda r: r["distill_len"])
    return draw_averages(args, [(f"$K$ demonstrations ($l$ = {distill_len})", "log", over_k),
                                (f"$l$ vectors ($K$ = {k})", "log", over_l)],
                         records, "Fig. 4: the distillation ratio.")


def trained(record: dict, stage: str, field: str):
    """A field of how the record's checkpoint was trained in a stage; None where it was not."""
    return ((record.get("trained_on") or {}).get(stage) or {}).get(field)


def fig6(args: argparse.Namespace) -> tuple[Figure, dict]:
    """Fig. 6, straight after pretraining: (a) Eq. (3) over beta, (b) CLM + gamma L_distill over gamma."""
    records = [r for r in load_records(args) if r["method"] == "mend" and not trained(r, "finetune", "tasks")]
    kl, both = ([r for r in records if trained(r, "pretrain", "objective") == name]
                for name in ("kl", "clm+kl"))
    over_beta = averages(kl, ("mend",), lambda r: trained(r, "pretrain", "beta"))
    over_gamma = averages(both, ("mend",), lambda r: trained(r, "pretrain", "gamma"))
    return draw_averages(args, [("β, share of a text that is $D$", "linear", over_beta),
                                ("γ, weight of $\\mathcal{L}_{\\mathrm{distill}}$ beside CLM", "log",
                                 over_gamma)],
                         records, "Fig. 6: after pretraining, no finetuning.")


def fig7(args: argparse.Namespace) -> tuple[Figure, dict]:
    """Fig. 7: over lambda of Eq. (4), after pretraining with Eq. (3). For lambda = 0 see Table 4."""
    records = [r for r in load_records(args) if r["method"] == "mend"
               and trained(r, "pretrain", "objective") == "kl"
               and trained(r, "finetune", "pred_weight") and trained(r, "finetune", "lam")]
    over_lambda = averages(records, ("mend",), lambda r: trained(r, "finetune", "lam"))
    return draw_averages(args, [("λ, weight of $\\mathcal{L}_{\\mathrm{distill}}$ in finetuning", "log",
                                 over_lambda)], records,
                         "Fig. 7: Eq. (4).")


# --------------------------------------------------------------------------------------------------
# Figs. 5 and 8: what attention.py measured


def fig8(args: argparse.Namespace) -> tuple[Figure, dict]:
    """Fig. 8: the induction score of each layer and head, the top four outlined."""
    record = load_json(args, "induction.json", ("scores", "heads"), "`python -m paper.attention`")
    scores = np.array(record["scores"])                                                 # (layers, heads)
    fig = Figure(figsize=(8, 1.6 + 0.22 * scores.shape[1]), layout="constrained")
    ax = fig.subplots()
    image = ax.imshow(scores.T, cmap="Blues", vmin=0, vmax=1, aspect="auto", origin="lower")
    for layer, head in record["heads"]:
        ax.add_patch(Rectangle((layer - 0.5, head - 0.5), 1, 1, fill=False, edgecolor="#D55E00",
                               linewidth=2.5))
    ax.set(xlabel="layer", ylabel="head", xticks=range(0, scores.shape[0], 2),
           yticks=range(0, scores.shape[1], 2))
    ax.spines[:].set_visible(True)
    fig.colorbar(image, ax=ax, label="induction score", pad=0.02)
    names = ", ".join(f"layer {a} head {b} ({scores[a, b]:.2f})" for a, b in record["heads"])
    caption(fig, f"Fig. 8: {record['llm']}, mean attention from each token of the second copy of a random "
                 f"sequence to what followed that token in the first; {record['sequences']} sequences of "
                 f"{record['length']} tokens, seed {record['seed']}. Outlined: {names}; counted from 0.\n"
                 f"{record['command']} · commit {record['commit']}")
    return fig, record


def fig5(args: argparse.Namespace) -> tuple[Figure, dict]:
    """Fig. 5: attention of the top induction heads from where the answer is predicted, ICL above MEND."""
    record = load_json(args, "attention.json", ("icl", "mend", "heads"),
                       "`python -m paper.attention --checkpoint DIR`")
    columns, n = max(len(record[m]["prefix"][0]) for m in ("icl", "mend")), len(record["query_tokens"])
    fig = Figure(figsize=(8, 5), layout="constrained")
    axes = fig.subplots(2, 1, sharex=True)
    for ax, method, what in zip(axes, ("icl", "mend"), (f"{record['demo_tokens']} demonstration tokens",
                                                         f"{record['distill_len']} vectors"), strict=True):
        prefix, query = np.array(record[method]["prefix"]), np.array(record[method]["query"])
        start, (heads, width), (colour, _, label) = columns - prefix.shape[1], prefix.shape, METHODS[method]
        for part, left, edge, line in ((query, columns + 1, GREY, 1), (prefix, start, colour, 3)):
            image = ax.imshow(part, cmap="Blues", norm=PowerNorm(0.5, 0, 1), aspect="auto",
                              extent=(left - 0.5, left + part.shape[1] - 0.5, heads - 0.5, -0.5))
            ax.add_patch(Rectangle((left - 0.5, -0.5), part.shape[1], heads, fill=False, edgecolor=edge,
                                   linewidth=line, clip_on=False))
        ax.set(xlim=(-0.6, columns + n + 0.6), ylim=(heads - 0.4, -0.6), ylabel="layer, head")
        ax.set_title(f"{label}: {what}, max-pooled to {width}, then the query", loc="left", color=colour)
        ax.set_yticks(range(heads), [f"{layer}, {head}" for layer, head in record["heads"]])
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    axes[1].set_xticks(range(columns + 1, columns + 1 + n), record["query_tokens"], rotation=90,
                       fontsize=min(11, 330 / n))
    fig.colorbar(image, ax=axes, label="attention", ticks=[0, 0.05, 0.2, 0.5, 1], pad=0.02)
    caption(fig, f"Fig. 5: {record['llm']}, attention of the strongest induction heads from the last query "
                 "token, the position that predicts the first answer token; outlined in colour, what stands "
                 f"before the query. {record['task']}, test example {record['example']}, seed "
                 f"{record['seed']}, K = {record['k']}. Checkpoint {record['checkpoint']}, step "
                 f"{record['step']:,} of {' + '.join(record['trained_on'])}.\n"
                 f"{record['command']} · commit {record['commit']}")
    return fig, record


# --------------------------------------------------------------------------------------------------


FIGURES = {"method": pictures.method, "fig3": fig3, "scaling": scaling, "fig4": fig4, "fig5": fig5,
           "fig6": fig6, "fig7": fig7, "fig8": fig8, "curves": pictures.curves,
           "ratios": pictures.ratios, "swaps": pictures.swaps}


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=FIGURES, help="which figure")
    parser.add_argument("runs", nargs="*", metavar="RUN_DIR", help="run folders, for curves")
    parser.add_argument("--results", nargs="+", metavar="FILE",
                        help="what to draw; default: what the figure's script "
                        "under paper/runs/, or attention.py, wrote to results/")
    parser.add_argument("--split", default="class_to_class", help="task partition of figs. 4, 6 and 7")
    parser.add_argument("--out", default=str(common.ROOT / "results" / "figures"),
                        help="folder of the pictures")
    return parser


def main(argv: list[str] | None = None) -> dict:
    args = get_parser().parse_args(argv)
    check((args.split in common.SPLITS,
           f"--split {args.split} is unknown; {common.did_you_mean(args.split, common.SPLITS)}"),
          (bool(args.runs) == (args.name == "curves"),
           (f"{args.name} with run folders {args.runs}: curves needs some, as in "
           "`python -m paper.figures curves out/pretrain`, and the others take none")))
    args.command = shlex.join(["python", "-m", "paper.figures", *(sys.argv[1:] if argv is None else argv)])
    out = Path(args.out)
    check((not out.is_file(), f"--out {out} is a file; give a folder"),
          common.place_rule("--out", f"{out}/{args.name}.png"))
    out.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        fig, drawn = FIGURES[args.name](args)
        with whole(out / f"{args.name}.png") as png, whole(out / f"{args.name}.svg") as svg:
            fig.savefig(png, format="png")
            fig.savefig(svg, format="svg", metadata={"Date": None})  # the same figures make the same file
    return finish({"figure": args.name, "files": [str(out / f"{args.name}.{kind}")
                                                  for kind in ("png", "svg")]}
                  ) | {"drawn": drawn}


if __name__ == "__main__":
    run_main(main)
