"""The figures: drawn from results/ as PNG and SVG, each with a caption that says n and the command.

    python -m paper.figures method                                        # our own: Figs. 1 and 2 in one
    python -m paper.figures fig3                                          # what each method costs at inference (Sec. 4.3)
    python -m paper.figures scaling                                       # our own: FLOPs over demonstration length and over l
    python -m paper.figures fig4                                          # over K and over l (Sec. 5.1)
    python -m paper.figures fig6                                          # over beta and gamma (App. B)
    python -m paper.figures fig7                                          # over lambda (App. B)
    python -m paper.figures fig5                                          # attention of the induction heads (Sec. 5.3)
    python -m paper.figures fig8                                          # which heads these are (App. C)
    python -m paper.figures curves out/pretrain out/finetune              # what training runs logged

Each function that draws returns the figure and the numbers in it. An average is a mean over tasks for each seed, then
mean and sample standard deviation over seeds; error bars are that deviation.
"""

import argparse
import json
import shlex
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from matplotlib.transforms import offset_copy

import common
from common import UserError, check, finish, run_main
from evaluate import read_results, summarise
from paper.tables import latest, require_fields
from run import load_checkpoint

# Okabe and Ito's palette, which stays distinct for colour-blind readers: colour, marker, label
METHODS = {"mend": ("#0072B2", "o", "MEND"), "icl": ("#D55E00", "s", "Vanilla ICL"),
           "hypertuning": ("#009E73", "^", "HyperTuning"), "prompt_tuning": ("#CC79A7", "D", "PromptTuning"),
           "zero_shot": ("#777777", "v", "no context"), "icl_budget": ("#E69F00", "P", "last $l$ tokens")}
INK, GREY = "#222222", "#666666"
STYLE = {"font.size": 12, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY,
         "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.titlesize": 12, "legend.frameon": False,
         "legend.fontsize": 11, "lines.linewidth": 2, "lines.markersize": 7, "mathtext.fontset": "dejavusans",
         "svg.hashsalt": "mend", "savefig.dpi": 200}
# what stands before the query in Fig. 3: label, colour, hatch of bars, style of lines
COSTS = {"icl": ("vanilla ICL", "#000000", "", "-"), "icl_cached": ("ICL, cached", "#56B4E9", "//", "--"),
         "prompt_tuning": ("PromptTuning; MEND, stored vectors", "#E69F00", "..", ":"),
         "mend": ("MEND, distilling each time", "#D55E00", "", "-"),
         "mend_kv": ("MEND, stored keys and values", "#009E73", "\\\\", "--")}
COST_SPLITS = {"class_to_class": "Class→\nClass", "hr_to_lr": "HR→\nLR", "qa_to_qa": "QA→\nQA",
               "non_nli_to_nli": "non-NLI\n→NLI", "non_para_to_para": "non-Para\n→Para"}
SOURCES = {"fig4": "fig4", "fig6": "ablations", "fig7": "ablations"}  # paper/runs/NAME.sh makes their results


def caption(fig: Figure, text: str) -> None:
    """Write `text` under the plots, in room of its own."""
    width, height = fig.get_size_inches()
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, int(width * 16.6))]
    room = (len(lines) * 0.15 + 0.16) / height
    fig.get_layout_engine().set(rect=(0.01, room, 0.98, 0.99 - room))
    fig.text(0.015, 0.08 / height, "\n".join(lines), fontsize=8, color=GREY, va="bottom", linespacing=1.25)


# ---------------------------------------------------------------------------------------------------------------------
# Our own method figure, the paper's Figs. 1 and 2 in one. The canvas is 100 units wide and 86 high; a unit is 0.08 inch,
# so that 14-point text is 2.4 units high and can be read at 400 pixels.

DEMO, ANSWER = "#F8DCC8", "#D55E00"      # Vanilla ICL's colour in METHODS, and a tint of it
TRAINED, VECTOR = "#CFE4F3", "#0072B2"   # MEND's
QUERY, GOLD, FROZEN = "#FAF0A8", "#8A7A00", "#E4E7EA"


def box(ax: Axes, x: float, y: float, w: float, h: float, text: str = "", face: str = "white", edge: str = INK,
        rounded: bool = True, colour: str = INK, size: float = 14, **style) -> None:
    """A box with its lower left corner at (x, y) and `text` in its middle."""
    shape = FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0,rounding_size=1") if rounded else Rectangle((x, y), w, h)
    shape.set(facecolor=face, edgecolor=edge, **({"linewidth": 1.2} | style))
    ax.add_patch(shape)
    ax.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=size, color=colour, linespacing=1.3)


def arrow(ax: Axes, start: tuple, end: tuple, colour: str = INK, **style) -> None:
    ax.add_patch(FancyArrowPatch(start, end, **({"arrowstyle": "-|>"} | style), mutation_scale=16, linewidth=1.8,
                                 color=colour, shrinkA=0, shrinkB=0))


def pairs(ax: Axes, x: float, y: float, names: str, h: float = 5.5, wide: float = 6.2) -> float:
    """Demonstrations side by side, (x_i, y_i) for each i of `names`, "." for an ellipsis; returns where they end."""
    for name in names:
        if name == ".":
            ax.text(x + 2, y + h / 2, "…", ha="center", va="center", fontsize=14, color=INK)
            x += 4
            continue
        box(ax, x, y, wide, h, f"$x_{name}$", DEMO, ANSWER, rounded=False)
        box(ax, x + wide, y, 3.4, h, f"$y_{name}$", ANSWER, ANSWER, rounded=False, colour="white")
        x += wide + 3.8
    return x - 0.4


def distribution(ax: Axes, x: float, y: float, heights: tuple[float, ...], label: str, colour: str) -> None:
    """Word probabilities as bars on a line, the label above."""
    for i, height in enumerate(heights):
        ax.add_patch(Rectangle((x + 2.3 * i, y), 1.8, height, facecolor=colour))
    ax.plot([x - 0.5, x + 2.3 * len(heights)], [y, y], color=INK, linewidth=1.2)
    ax.text(x + 5.5, y + 8.6, label, ha="center", va="bottom", fontsize=14, color=INK)


def reading(ax: Axes) -> None:
    """The upper two panels: the LLM reads D and x (teacher), or what the distiller makes of D, and x (student)."""
    def note(x, y, text, **style):
        ax.text(x, y, text, **({"fontsize": 13, "color": INK, "ha": "center", "va": "center"} | style))

    box(ax, 1, 64, 98, 21, face="#FEF7F2", edge="none")
    note(3, 81.6, "Vanilla ICL: the teacher", ha="left", fontsize=15, weight="bold", color=ANSWER)
    pairs(ax, 3, 71, "123.K")
    note(3, 67.6, "demonstrations $D$, read by the LLM", ha="left")
    box(ax, 49, 71, 7, 5.5, "$x$", QUERY, rounded=False)
    arrow(ax, (56.6, 73.7), (62, 73.7))
    box(ax, 62.5, 67, 15, 13.5, "LLM\nfrozen", FROZEN, GREY)
    arrow(ax, (78, 73.7), (82.5, 73.7))
    distribution(ax, 84, 68, (3, 8, 1.5, 5, 2), "$P(·|D,x)$", ANSWER)

    box(ax, 1, 25, 98, 37, face="#F0F7FC", edge="none")
    note(3, 58.6, "MEND: the student", ha="left", fontsize=15, weight="bold", color=VECTOR)
    end = pairs(ax, 3, 48, "1.K", wide=5.4)
    for i in range(3):
        box(ax, end + 1 + 3.2 * i, 48, 2.8, 5.5, face="white", edge=VECTOR, rounded=False, linestyle=(0, (2, 1.5)))
    note(3, 44.7, "$D$ and $l$ placeholders", ha="left")
    arrow(ax, (end + 11.2, 50.7), (41, 50.7))
    box(ax, 41.5, 45.3, 17, 11, "distiller\ntrained", TRAINED, VECTOR, linewidth=2)
    arrow(ax, (43.5, 45), (43.5, 39.2))
    for i in range(3):
        box(ax, 38.9 + 3.2 * i, 33, 2.8, 5.5, face=VECTOR, edge=VECTOR, rounded=False)
    note(37.6, 35.7, "$l$ vectors $S_D$, read\ninstead of $D$", ha="right", linespacing=1.3)
    box(ax, 49, 33, 7, 5.5, "$x$", QUERY, rounded=False)
    arrow(ax, (56.6, 35.7), (62, 35.7))
    box(ax, 62.5, 29, 15, 13.5, "LLM\nfrozen", FROZEN, GREY)
    arrow(ax, (78, 35.7), (82.5, 35.7))
    distribution(ax, 84, 32, (2.4, 7, 2.6, 4, 2.6), "$P(·|S_D,x)$", VECTOR)
    arrow(ax, (89.5, 65.5), (89.5, 45.5), INK, arrowstyle="<|-|>")
    note(88, 57.3, r"KL = $\mathcal{L}_{\mathrm{distill}}$, Eq. (3)", ha="right")
    note(89.5, 27.8, r"$\mathcal{L}_{\mathrm{pred}}$, Eq. (4)")
    arrow(ax, (70, 43), (59.1, 50), VECTOR, linestyle=(0, (3, 2)), connectionstyle="arc3,rad=0.25")
    note(69.5, 49.2, "gradient", ha="left", color=VECTOR)


def stages(ax: Axes) -> None:
    """The lower two panels: what D, x and y are in each stage, and which loss trains the distiller."""
    distill, pred = r"\mathcal{L}_{\mathrm{distill}}", r"\mathcal{L}_{\mathrm{pred}}"
    for x, title, loss in ((1, "1  Pretraining on text", f"minimise  ${distill}$"),
                           (51, "2  Finetuning on tasks", f"minimise  ${pred} + λ\\,{distill}$")):
        box(ax, x, 1, 48, 22, face="#F4F4F4", edge="none")
        ax.text(x + 2, 19.6, title, fontsize=15, weight="bold", color=INK, va="center")
        ax.text(x + 2, 4, loss, fontsize=14, color=INK, va="center")
    box(ax, 3, 9.5, 32, 5.5, "$D$: first $β$", DEMO, ANSWER, rounded=False)
    box(ax, 35.4, 9.5, 11, 5.5, "$x$: rest", QUERY, rounded=False)
    end = pairs(ax, 53, 9.5, "1.K")
    box(ax, end + 2, 9.5, 7, 5.5, "$x$", QUERY, rounded=False)
    box(ax, end + 9, 9.5, 3.4, 5.5, "$y$", GOLD, rounded=False, colour="white")


def method(args) -> tuple[Figure, dict]:
    """Teacher and student above, the two stages below."""
    fig = Figure(figsize=(8, 6.88), facecolor="white")  # white, so that it stands on a dark page too
    ax = fig.add_axes((0, 0, 1, 1), xlim=(0, 100), ylim=(0, 86))
    ax.axis("off")
    reading(ax)
    stages(ax)
    return fig, {}


# ---------------------------------------------------------------------------------------------------------------------
# Fig. 3 and scaling: what `bench.py --fig3` counted and timed


def load_json(args: argparse.Namespace, name: str, needs: tuple[str, ...], command: str) -> dict:
    """The one results file of a figure that is no table of evaluations; `command` makes it."""
    paths = args.results or [str(common.ROOT / "results" / name)]
    check((len(paths) == 1, f"--results {' '.join(paths)}: {args.name} takes one file"))
    try:
        record = json.loads(Path(paths[0]).read_text(encoding="utf-8"))
        if lacking := [key for key in needs if key not in record]:
            raise ValueError(f"it lacks {', '.join(lacking)}")
        return record
    except (OSError, ValueError) as error:
        raise UserError(f"{paths[0]} does not hold what {args.name} draws ({error}); make it with {command}") from error


def load_costs(args: argparse.Namespace) -> dict:
    return load_json(args, "fig3.json", ("settings", "scaling"), "`python bench.py --preset paper --fig3`")


def cost_caption(fig: Figure, results: dict) -> None:
    """The legend above, and below the command and commit that made the figures."""
    fig.legend(*fig.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    caption(fig, f"{results['command']} · {results['commit']} · {results['query_tokens']} query tokens, "
                 f"l = {results['distill_len']}, batch 1; counted in 16 bit")


def fig3(args) -> tuple[Figure, dict]:
    """Fig. 3: FLOPs and peak memory counted for both GPT-2s, and time where it was measured."""
    results = load_costs(args)
    llms = [name for name in ("gpt2-large", "gpt2-xl") if any(s["llm"] == name for s in results["settings"])]
    counted = {name: [s for s in results["settings"] if s["llm"] == name] for name in llms}
    panels = [(f"{name}: TFLOP a query", [s["rows"] for s in counted[name]], "query_flops", 1e12) for name in llms]
    panels += [(f"{name}: peak memory, GB", [s["rows"] for s in counted[name]], "peak_bytes", 1e9) for name in llms]
    if measured := results.get("measured"):
        panels.append((f"{measured[0]['llm']}: seconds a query, CPU" if "cores" in results["machine"] else
                       f"{measured[0]['llm']}: seconds a query, GPU", [m["rows"] for m in measured], "seconds", 1))
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


def scaling(args) -> tuple[Figure, dict]:
    """FLOPs of a query against demonstration length and against l, with the points where curves cross."""
    results = load_costs(args)
    llms = results["scaling"]
    fig = Figure(figsize=(9, 3 * len(llms) + 0.8), layout="constrained")
    axes = fig.subplots(len(llms), 2, squeeze=False)
    for row, llm in zip(axes, llms, strict=True):
        for axis, (key, label) in zip(row, (("demo_tokens", "demonstration tokens"), ("distill_len", "l, distilled vectors")), strict=True):
            curves = llm[key]
            for method, (name, colour, _, style) in COSTS.items():
                y = [f / 1e12 for f in curves["flops"][method]]
                axis.plot(curves["x"], y, style, color=colour, label=name, linewidth=2)
            for pair, below in (("icl and mend", -13), ("icl_cached and mend_kv", 5)):
                if (at := curves["crossings"].get(pair)) is not None:
                    y = np.interp(at, curves["x"], curves["flops"][pair.split(" and ")[0]]) / 1e12
                    axis.plot(at, y, "o", color="white", markeredgecolor="black", markersize=8, zorder=5)
                    axis.annotate(f"{at:.0f}", (at, y), textcoords="offset points", xytext=(7, below), fontsize=10)
            axis.set_title(llm["llm"], fontsize=11)
            axis.set_xlabel(label, fontsize=10)
            axis.set_ylabel("TFLOP a query", fontsize=10)
            axis.set_yscale("log")
    cost_caption(fig, results)
    return fig, {llm["llm"]: {key: llm[key]["crossings"] for key in ("demo_tokens", "distill_len")} for llm in llms}


# ---------------------------------------------------------------------------------------------------------------------
# Figs. 4, 6 and 7: the headline over one setting.


def load_records(args: argparse.Namespace) -> list[dict]:
    """The records of evaluate.py of one split, with MetaICL's own demonstrations, unperturbed."""
    paths = [Path(p) for p in args.results or sorted((common.ROOT / "results").glob(f"{args.name}*.jsonl"))]
    check(*((path.is_file(), f"--results {path} is no file; run paper/runs/{SOURCES[args.name]}.sh, which makes it") for path in paths))
    records = [r for path in paths for r in read_results(path)]
    require_fields(records, args.name)
    chosen = [r for r in records if r["split"] == args.split and r["retrieval"] is None and r["perturbation"] is None]
    if not chosen:
        raise UserError(f"{', '.join(p.name for p in paths) or 'results/'}: {len(records)} records, none of --split "
                        f"{args.split} without retrieval and perturbation; run paper/runs/{SOURCES[args.name]}.sh, which makes them")
    return chosen


def most_varied(records: list[dict], hold: str, vary: str):
    """The value of field `hold` under which field `vary` takes most values (of several such, the largest)."""
    values = {r[hold] for r in records}
    return max(values, key=lambda v: (len({r[vary] for r in records if r[hold] == v}), v))


def averages(records: list[dict], methods: tuple[str, ...], x: Callable[[dict], float | None]) -> dict:
    """The points of one panel: {"points": {method: [[x, mean, std], ...]}, "tasks", "seeds", "queries"}, in percent.

    A point that lacks some (task, seed) of the others would average over something else: it is left out, with a note.
    Raises UserError where records of different settings would be mixed.
    """
    groups = defaultdict(list)
    for r in records:
        if r["method"] in methods and x(r) is not None:
            groups[r["method"], x(r)].append(r)
    used = [r for group in groups.values() for r in group]
    settings = {f: {r[f] for r in used} for f in ("llm", "tasks", "template", "context_len", "limit", "dtype")}
    check(*((len(values) <= 1, (f"records with {field} {' and '.join(sorted(map(str, values)))} cannot share a panel; "
                                "give --results a file with one of them")) for field, values in settings.items()))
    everything = {(r["task"], r["seed"]) for r in used}
    data = {"points": {m: [] for m in methods}, "tasks": len({t for t, _ in everything}),
            "seeds": len({s for _, s in everything}), "queries": 0}
    for (method, value), group in sorted(groups.items()):
        group = latest(group)
        here = {(r["task"], r["seed"]) for r in group}
        if here == everything:
            data["points"][method].append([value, *summarise(group, [method])["average"][method]])
            data["queries"] = sum(r["n"] for r in group)
        else:
            print(f"note: {method} at {value} has {len(here)} of {len(everything)} (task, seed): the point is left out")
    for method in [m for m, points in data["points"].items() if not points]:
        print(f"note: no complete records of {method}: its line is left out")
    return data


def draw_averages(args, panels: list[tuple[str, str, dict]], records: list[dict], what: str) -> tuple[Figure, dict]:
    """One panel for each (x label, x scale, averages)."""
    panels = [panel for panel in panels if len({x for points in panel[2]["points"].values() for x, _, _ in points}) > 1]
    check((panels, f"{args.name} needs two complete points at least; run paper/runs/{SOURCES[args.name]}.sh to its end"))
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
            handles[label] = ax.errorbar(xs, means, yerr=stds, color=colour, marker=marker, label=label, capsize=3,
                                         elinewidth=1.2, transform=beside)
            ax.update_datalim([(x, mean + end) for x, mean, std in data["points"][method] for end in (-std, std)])
        ax.margins(x=0.08)
        ticks = sorted({p[0] for points in data["points"].values() for p in points})
        ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
        ax.minorticks_off()
        ax.set_xlabel(xlabel)
        ax.set_title(f"({letter})" if len(panels) > 1 else "", loc="left")
        ax.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes[0].set_ylabel("headline, %" if len(handles) > 1 else f"headline of {next(iter(handles))}, %")
    if len(handles) > 1:
        fig.legend(handles.values(), handles, loc="outside upper center", ncols=len(handles), columnspacing=1.2)
    n = "; ".join(dict.fromkeys(f"{d['tasks']} tasks × {d['seeds']} seeds, {d['queries']:,} queries a point"
                                for _, _, d in panels))
    caption(fig, f"{what} {records[0]['llm']}, {args.split}, {n}. Headline: macro-F1 for classification, accuracy "
                 f"otherwise; mean over tasks, bars: standard deviation over seeds{', methods side by side' * (len(handles) > 1)}."
                 f"\nruns/{SOURCES[args.name]}.sh; "
                 f"{args.command} · commit {', '.join(sorted({r['commit'] for r in records}))}")
    return fig, {f"{args.name}{letter}" if len(panels) > 1 else args.name: p[2]
                 for letter, p in zip("ab", panels, strict=False)}


def fig4(args) -> tuple[Figure, dict]:
    """Fig. 4: (a) over K at one l, (b) over l at one K."""
    records = load_records(args)
    l, k = most_varied(records, "distill_len", "k"), most_varied(records, "k", "distill_len")
    over_k = averages([r for r in records if r["distill_len"] == l], ("icl", "hypertuning", "mend"), lambda r: r["k"])
    over_l = averages([r for r in records if r["k"] == k], ("prompt_tuning", "hypertuning", "mend"),
                      lambda r: r["distill_len"])
    return draw_averages(args, [(f"$K$ demonstrations ($l$ = {l})", "log", over_k), (f"$l$ vectors ($K$ = {k})", "log", over_l)],
                         records, "Fig. 4: the distillation ratio.")


def trained(record: dict, stage: str, field: str):
    """A field of how the record's checkpoint was trained in a stage; None where it was not."""
    return ((record.get("trained_on") or {}).get(stage) or {}).get(field)


def fig6(args) -> tuple[Figure, dict]:
    """Fig. 6, straight after pretraining: (a) Eq. (3) over beta, (b) CLM + gamma L_distill over gamma."""
    records = [r for r in load_records(args) if r["method"] == "mend" and not trained(r, "finetune", "tasks")]
    kl, both = ([r for r in records if trained(r, "pretrain", "objective") == name] for name in ("kl", "clm+kl"))
    over_beta = averages(kl, ("mend",), lambda r: trained(r, "pretrain", "beta"))
    over_gamma = averages(both, ("mend",), lambda r: trained(r, "pretrain", "gamma"))
    return draw_averages(args, [("β, share of a text that is $D$", "linear", over_beta),
                                ("γ, weight of $\\mathcal{L}_{\\mathrm{distill}}$ beside CLM", "log", over_gamma)],
                         records, "Fig. 6: after pretraining, no finetuning.")


def fig7(args) -> tuple[Figure, dict]:
    """Fig. 7: over lambda of Eq. (4), after pretraining with Eq. (3). lambda = 0 has no place on a log axis (Tab. 4)."""
    records = [r for r in load_records(args) if r["method"] == "mend" and trained(r, "pretrain", "objective") == "kl"
               and trained(r, "finetune", "pred_weight") and trained(r, "finetune", "lam")]
    over_lambda = averages(records, ("mend",), lambda r: trained(r, "finetune", "lam"))
    return draw_averages(args, [("λ, weight of $\\mathcal{L}_{\\mathrm{distill}}$ in finetuning", "log", over_lambda)], records,
                         "Fig. 7: Eq. (4).")


# ---------------------------------------------------------------------------------------------------------------------
# Figs. 5 and 8: what attention.py measured


def fig8(args) -> tuple[Figure, dict]:
    """Fig. 8: the induction score of each layer and head, the top four outlined."""
    record = load_json(args, "induction.json", ("scores", "heads"), "`python -m paper.attention`")
    scores = np.array(record["scores"])                                                              # (layers, heads)
    fig = Figure(figsize=(8, 1.6 + 0.22 * scores.shape[1]), layout="constrained")
    ax = fig.subplots()
    image = ax.imshow(scores.T, cmap="Blues", vmin=0, vmax=1, aspect="auto", origin="lower")
    for layer, head in record["heads"]:
        ax.add_patch(Rectangle((layer - 0.5, head - 0.5), 1, 1, fill=False, edgecolor="#D55E00", linewidth=2.5))
    ax.set(xlabel="layer", ylabel="head", xticks=range(0, scores.shape[0], 2), yticks=range(0, scores.shape[1], 2))
    ax.spines[:].set_visible(True)
    fig.colorbar(image, ax=ax, label="induction score", pad=0.02)
    names = ", ".join(f"layer {l} head {h} ({scores[l, h]:.2f})" for l, h in record["heads"])
    caption(fig, f"Fig. 8: {record['llm']}, mean attention from each token of the second copy of a random sequence to "
                 f"what followed that token in the first; {record['sequences']} sequences of {record['length']} tokens, "
                 f"seed {record['seed']}. Outlined: {names}; counted from 0.\n"
                 f"{record['command']} · commit {record['commit']}")
    return fig, record


def fig5(args) -> tuple[Figure, dict]:
    """Fig. 5: attention of the top four induction heads from where the answer is predicted, ICL above MEND."""
    record = load_json(args, "attention.json", ("icl", "mend", "heads"), "`python -m paper.attention --checkpoint DIR`")
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
            ax.add_patch(Rectangle((left - 0.5, -0.5), part.shape[1], heads, fill=False, edgecolor=edge, linewidth=line,
                                   clip_on=False))
        ax.set(xlim=(-0.6, columns + n + 0.6), ylim=(heads - 0.4, -0.6), ylabel="layer, head")
        ax.set_title(f"{label}: {what}, max-pooled to {width}, then the query", loc="left", color=colour)
        ax.set_yticks(range(heads), [f"{layer}, {head}" for layer, head in record["heads"]])
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    axes[1].set_xticks(range(columns + 1, columns + 1 + n), record["query_tokens"], rotation=90, fontsize=min(11, 330 / n))
    fig.colorbar(image, ax=axes, label="attention", ticks=[0, 0.05, 0.2, 0.5, 1], pad=0.02)
    caption(fig, f"Fig. 5: {record['llm']}, attention of the strongest induction heads from the last query token, the "
                 f"position that predicts the first answer token; outlined in colour, what stands before the query. "
                 f"{record['task']}, test example {record['example']}, seed {record['seed']}, K = {record['k']}. Checkpoint "
                 f"{record['checkpoint']}, step {record['step']:,} of {' + '.join(record['trained_on'])}.\n"
                 f"{record['command']} · commit {record['commit']}")
    return fig, record


# ---------------------------------------------------------------------------------------------------------------------
# Training curves


def running_mean(values: list[float], width: int) -> np.ndarray:
    """The mean of each value and the up to width - 1 before it."""
    return np.array([np.mean(values[max(0, i + 1 - width):i + 1]) for i in range(len(values))])


def draw_run(ax: Axes, share_ax: Axes, run: Path) -> tuple[dict, str]:
    """One run: its loss and references, and beside it what the vectors recover (pretraining) or the dev headline.

    Returns what is drawn, {"training": [[step, running mean], ...], "evaluations": records}, and a note.
    """
    records = read_results(run / "metrics.jsonl")
    steps, evaluations = ([r for r in records if ("val_kl" in r) == wanted] for wanted in (False, True))
    check((steps, f"{run / 'metrics.jsonl'} has no training step; give the folder of a training run"))
    _, state = load_checkpoint(run, weights=False)
    pretraining = "finetune" not in state["trained_on"]
    loss, held_out, share, name, share_name = ("kl", "val_kl", "recovered", "KL, nats a token", "recovered, %") \
        if pretraining else ("pred", "val_pred", "dev_headline", "answer loss, nats a token", "dev headline, %")
    width, colour, at = max(1, len(steps) // 40), METHODS["mend"][0], [r["step"] for r in evaluations]
    training = []  # stays empty where the run minimises something else
    if loss in steps[0]:
        means = running_mean([r[loss] for r in steps], width)
        training = [[r["step"], mean] for r, mean in zip(steps, means, strict=True)]
        ax.plot(*zip(*training, strict=True), color="#8FBCD8", label="training")
    if evaluations:
        ax.plot(at, [r[held_out] for r in evaluations], color=colour, marker="o",
                label="held out" if pretraining else "dev tasks")
        share_ax.plot(at, [100 * r[share] for r in evaluations], color=colour, marker="o")
        low, high = share_ax.get_ylim()
        share_ax.set_ylim(min(low, high - 5), max(high, low + 5))  # a change of a hundredth shall not look like one
        for reference, method in (("val_kl_no_context", "zero_shot"), ("val_kl_last_l", "icl_budget")):
            if reference in evaluations[-1]:
                c, _, label = METHODS[method]
                ax.axhline(evaluations[-1][reference], color=c, linestyle="--", label=label)
    else:
        share_ax.text(0.5, 0.5, "no evaluation yet", transform=share_ax.transAxes, color=GREY, ha="center")
        share_ax.set(yticks=[])
    for axis, label in ((ax, name), (share_ax, share_name)):
        axis.set(xlabel="step", ylabel=label, xlim=(0, 1.02 * steps[-1]["step"]))
        axis.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    ax.set_title(run.name, loc="left")
    if ax.lines:
        ax.legend()
    held_out_n = f", {state['flags']['eval_docs']} held-out windows" if pretraining else ""
    return {"training": training, "evaluations": evaluations}, (
        f"{run.name}: {steps[-1]['step']:,} of {state['flags']['steps']:,} steps, one run, training loss averaged over "
        f"{width} steps{held_out_n}, commit {state['commit']}.")


def curves(args) -> tuple[Figure, dict]:
    """A row of two panels for each run folder."""
    fig = Figure(figsize=(8.4, 3.1 * len(args.runs) + 0.8), layout="constrained")
    rows = fig.subplots(len(args.runs), 2, squeeze=False)
    runs = {Path(run).name: draw_run(*axes, Path(run)) for run, axes in zip(args.runs, rows, strict=True)}
    caption(fig, " ".join(note for _, note in runs.values()) + f"\n{args.command}")
    return fig, {name: drawn for name, (drawn, _) in runs.items()}


# ---------------------------------------------------------------------------------------------------------------------


FIGURES = {"method": method, "fig3": fig3, "scaling": scaling, "fig4": fig4, "fig5": fig5, "fig6": fig6, "fig7": fig7, "fig8": fig8, "curves": curves}


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=FIGURES, help="which figure")
    parser.add_argument("runs", nargs="*", metavar="RUN_DIR", help="run folders, for curves")
    parser.add_argument("--results", nargs="+", metavar="FILE", help="what to draw; default: what the figure's script "
                        "under paper/runs/, or attention.py, wrote to results/")
    parser.add_argument("--split", default="class_to_class", help="task partition of figs. 4, 6 and 7")
    parser.add_argument("--out", default=str(common.ROOT / "results" / "figures"), help="folder of the pictures")
    return parser


def main(argv: list[str] | None = None) -> dict:
    args = get_parser().parse_args(argv)
    check((args.split in common.SPLITS, f"--split {args.split} is unknown; {common.did_you_mean(args.split, common.SPLITS)}"),
          (bool(args.runs) == (args.name == "curves"), (f"{args.name} with run folders {args.runs}: curves needs some, as in "
           "`python -m paper.figures curves out/pretrain`, and the others take none")))
    args.command = shlex.join(["python", "-m", "paper.figures", *(sys.argv[1:] if argv is None else argv)])
    out = Path(args.out)
    check((not out.is_file(), f"--out {out} is a file; give a folder"), common.place_rule("--out", args.out))
    out.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        fig, drawn = FIGURES[args.name](args)
        fig.savefig(out / f"{args.name}.png")
        fig.savefig(out / f"{args.name}.svg", metadata={"Date": None})  # the same figures make the same file
    return finish({"figure": args.name, "files": [str(out / f"{args.name}.{kind}") for kind in ("png", "svg")]}
                  ) | {"drawn": drawn}


if __name__ == "__main__":
    run_main(main)
