"""What the figures share, and four that are not the paper's: method, training curves, ratios, swaps."""

import functools
import json
import textwrap
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from common import ROOT, UserError, check
from loading import load_checkpoint
from paper.summary import gains_of, read_results, require_one_setting

# Okabe and Ito's palette, which stays distinct for colour-blind readers: colour, marker, label
METHODS = {"mend": ("#0072B2", "o", "MEND"), "icl": ("#D55E00", "s", "Vanilla ICL"),
           "hypertuning": ("#009E73", "^", "HyperTuning"), "prompt_tuning": ("#CC79A7", "D", "PromptTuning"),
           "zero_shot": ("#777777", "v", "no context"), "last_l": ("#56B4E9", "X", "last $l$ tokens"),
           "icl_budget": ("#E69F00", "P", "ICL of equal length")}
RATIOS = {"mend": "MEND", "last_l": "D's last $l$ tokens", "icl_budget": "ICL of equal length",
          "mend_constant": "MEND, mean of other tasks", "mend_swapped": "MEND, another task's"}
INK, GREY = "#222222", "#666666"
STYLE = {"font.size": 12, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY,
         "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.titlesize": 12,
         "legend.frameon": False, "legend.fontsize": 11, "lines.linewidth": 2, "lines.markersize": 7,
         "mathtext.fontset": "dejavusans", "svg.hashsalt": "mend", "savefig.dpi": 200}


def caption(fig: Figure, text: str) -> None:
    """Write `text` under the plots, in room of its own."""
    width, height = fig.get_size_inches()
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, int(width * 16.6))]
    room = (len(lines) * 0.15 + 0.16) / height
    fig.get_layout_engine().set(rect=(0.01, room, 0.98, 0.99 - room))
    fig.text(0.015, 0.08 / height, "\n".join(lines), fontsize=8, color=GREY, va="bottom", linespacing=1.25)


# --------------------------------------------------------------------------------------------------
# Our own method figure, the paper's Figs. 1 and 2 in one. The canvas is 100 units wide and 86 high; a unit is
# 0.08 inch, so that 14-point text is 2.4 units high and can be read at 400 pixels.

DEMO, ANSWER = "#F8DCC8", "#D55E00"      # Vanilla ICL's colour in METHODS, and a tint of it
TRAINED, VECTOR = "#CFE4F3", "#0072B2"   # MEND's
QUERY, GOLD, FROZEN = "#FAF0A8", "#8A7A00", "#E4E7EA"


def box(ax: Axes, x: float, y: float, w: float, h: float, text: str = "", face: str = "white",
        edge: str = INK, rounded: bool = True, colour: str = INK, size: float = 14, **style) -> None:
    """A box with its lower left corner at (x, y) and `text` in its middle."""
    round_box = functools.partial(FancyBboxPatch, boxstyle="round,pad=0,rounding_size=1")
    shape = (round_box if rounded else Rectangle)((x, y), w, h)
    shape.set(facecolor=face, edgecolor=edge, **({"linewidth": 1.2} | style))
    ax.add_patch(shape)
    ax.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=size, color=colour,
            linespacing=1.3)


def arrow(ax: Axes, start: tuple, end: tuple, colour: str = INK, **style) -> None:
    ax.add_patch(FancyArrowPatch(start, end, **({"arrowstyle": "-|>"} | style), mutation_scale=16,
                                 linewidth=1.8, color=colour, shrinkA=0, shrinkB=0))


def pairs(ax: Axes, x: float, y: float, names: str, h: float = 5.5, wide: float = 6.2) -> float:
    """Demonstrations side by side, (x_i, y_i) for each i of `names`, "." an ellipsis; returns their end."""
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
    """The upper two panels: the LLM reads D and x (teacher), or vectors of D and x (student)."""
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
        box(ax, end + 1 + 3.2 * i, 48, 2.8, 5.5, face="white", edge=VECTOR, rounded=False,
            linestyle=(0, (2, 1.5)))
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


# --------------------------------------------------------------------------------------------------
# Training curves


def running_mean(values: list[float], width: int) -> np.ndarray:
    """The mean of each value and the up to width - 1 before it."""
    return np.array([np.mean(values[max(0, i + 1 - width):i + 1]) for i in range(len(values))])


def draw_run(ax: Axes, share_ax: Axes, run: Path) -> tuple[dict, str]:
    """One run: its loss and references, beside it what the vectors recover (pretraining) or the dev headline.

    Returns what is drawn, {"training": [[step, running mean], ...], "evaluations": records}, and a note.
    """
    records = read_results(run / "metrics.jsonl")
    evaluations = [r for r in records if "dev_option_ce" in r or "heldout_kl" in r]
    steps = [r for r in records if r not in evaluations]
    check((steps, f"{run / 'metrics.jsonl'} has no training step; give the folder of a training run"))
    _, state = load_checkpoint(run, weights=False)
    pretraining = "finetune" not in state["trained_on"]
    loss, held_out, share, name, share_name = (
        ("kl", "heldout_kl", "recovered", "KL, nats a token", "recovered, %") if pretraining else
        ("pred", "dev_pred", "dev_headline", "answer loss, nats a token", "dev headline, %"))
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
        share_ax.set_ylim(min(low, high - 5), max(high, low + 5))  # a hundredth shall not look like much
        for end, method in (("no_context", "zero_shot"), ("last_l", "last_l")):
            if (reference := f"heldout_kl_{end}") in evaluations[-1]:
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
        f"{run.name}: {steps[-1]['step']:,} of {state['flags']['steps']:,} steps, one run, training loss "
        f"averaged over {width} steps{held_out_n}, commit {state['commit']}.")


def curves(args) -> tuple[Figure, dict]:
    """A row of two panels for each run folder."""
    fig = Figure(figsize=(8.4, 3.1 * len(args.runs) + 0.8), layout="constrained")
    rows = fig.subplots(len(args.runs), 2, squeeze=False)
    runs = {Path(run).name: draw_run(*axes, Path(run)) for run, axes in zip(args.runs, rows, strict=True)}
    caption(fig, " ".join(note for _, note in runs.values()) + f"\n{args.command}")
    return fig, {name: drawn for name, (drawn, _) in runs.items()}


# --------------------------------------------------------------------------------------------------
# Whether a distiller distils: over the ratio of tokens to vectors, and swapped


def gains_by_ratio(records: list[dict]) -> dict[str, list[tuple[float, float]]]:
    """{method: [(ratio, recovered gain in percent), ...]}; a ratio is the mean number of tokens that icl has
    in front of a query, over that of vectors, l in each segment. What icl and zero_shot answer depends on no
    l: one line of them will do."""
    segments = records[0].get("segments") or 1
    check((segments != "auto", "--segments auto: no ratio, as each D has vectors of its own number; give N"))
    both = [r for r in records if r["method"] in ("icl", "zero_shot")]
    tokens = np.mean([r["demo_tokens"] for r in both if r["method"] == "icl"])
    drawn: dict[str, list] = {}
    for method in RATIOS:
        for length in sorted({r["distill_len"] for r in records if r["method"] == method}, reverse=True):
            here = [r for r in records if (r["method"], r["distill_len"]) == (method, length)]
            if gain := gains_of([*both, *here]).get(method):
                drawn.setdefault(method, []).append((float(tokens / length / segments), 100 * gain["gain"]))
    return drawn


def ratios(args) -> tuple[Figure, dict]:
    """Recovered gain over the ratio of demonstration tokens to vectors, a panel for each results file."""
    files = args.results or [str(ROOT / "results" / f"ratios-{name}.jsonl")
                             for name in ("functions", "early", "recall")]
    read = {Path(f).stem: read_results(Path(f), "method", "task", "seed", "headline", "n") for f in files}
    check(*(({"icl", "zero_shot"} <= {r["method"] for r in records}
             and all("demo_tokens" in r for r in records),
             f"{name} lacks icl, zero_shot or demo_tokens; make it with paper/runs/ratios.sh")
            for name, records in read.items()))
    for name, records in read.items():
        require_one_setting(name, records)
    fig = Figure(figsize=(4 * len(read), 5), layout="constrained")
    axes, drawn, counts = fig.subplots(1, len(read), squeeze=False)[0], {}, []
    for ax, (name, records) in zip(axes, read.items(), strict=True):
        drawn[name] = gains_by_ratio(records)
        for i, (method, points) in enumerate(drawn[name].items()):
            colour, marker, _ = METHODS.get(method, (f"C{i + 4}", "x*"[i % 2], ""))
            ax.plot(*zip(*points, strict=True), color=colour, marker=marker, label=RATIOS[method],
                    linestyle="-" if method == "mend" else "--")
        ax.axhline(100, color=METHODS["icl"][0], linewidth=1, label="ICL, all of D")
        ax.axhline(0, color=GREY, linewidth=1, label="no demonstrations")
        ticks = sorted({round(x, 1) for points in drawn[name].values() for x, _ in points})
        ax.set(xscale="log", xlabel="tokens a vector", ylabel="recovered gain, %" if ax is axes[0] else "")
        ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
        ax.minorticks_off()
        n = {(r["task"], r["seed"]): r["n"] for r in records}
        tasks, seeds = len({task for task, _ in n}), len({seed for _, seed in n})
        ax.set_title(f"{records[0]['tasks']}, {tasks} tasks", loc="left")
        counts.append(f"{records[0]['tasks']} {sum(n.values()):,} of {seeds} set{'s' * (seeds > 1)}")
    handles, labels = axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper center", ncols=2)
    one = next(iter(read.values()))
    caption(fig, f"Recovered gain, (method - zero-shot) / (ICL - zero-shot), of {one[0]['llm']}, one "
                 f"checkpoint for all l, K = {one[0]['k']}; queries a point: {', '.join(counts)}.\n"
                 f"paper/runs/ratios.sh; {args.command} · commit "
                 f"{', '.join(sorted({r['commit'] for records in read.values() for r in records}))}")
    return fig, drawn


def swaps(args) -> tuple[Figure, dict]:
    """The matrices of swaps.py: whose demonstrations were distilled, whose queries were asked."""
    path = Path((args.results or [str(ROOT / "results" / "swaps.json")])[0])
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        matrices, families = record["matrices"], record["families"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not hold what swaps draws ({error}); make it with "
                        "`python -m paper.swaps`") from error
    fig = Figure(figsize=(4.8 * len(matrices), 5.6), layout="constrained")
    starts = [i for i, family in enumerate(families) if i == 0 or family != families[i - 1]]
    middles = [(a + b - 1) / 2 for a, b in zip(starts, [*starts[1:], len(families)], strict=True)]
    axes = fig.subplots(1, len(matrices), squeeze=False, sharey=True)[0]
    for ax, (method, matrix) in zip(axes, matrices.items(), strict=True):
        image = ax.imshow(np.array(matrix), cmap="Blues", vmin=0, vmax=1)
        for at in starts[1:]:
            ax.axhline(at - 0.5, color=GREY, linewidth=0.6)
            ax.axvline(at - 0.5, color=GREY, linewidth=0.6)
        found, label = record["figures"][method], METHODS.get(method, ("", "", RATIOS.get(method, "")))[2]
        swapped = found["elsewhere"] if found["same_family"] is None else found["same_family"]
        ax.set_title(f"{label}: own {found['diagonal']:.0f}%, swapped {swapped:.0f}%", loc="left")
        names = [families[i] for i in starts]
        ax.set_xticks(middles, names, rotation=90)
        ax.set_yticks(middles, names)
        ax.tick_params(length=0)
        ax.set(xlabel="whose queries are asked")
    axes[0].set(ylabel="whose demonstrations are distilled")
    fig.colorbar(image, ax=axes, label="right answers", shrink=0.7, pad=0.02)
    caption(fig, f"{record['llm']}, {len(families)} held-out functions, {record['queries']} queries a row, "
                 f"K = {record['k']}, seed {record['seed']}, l = {record['distill_len']}; swapped: another "
                 f"function of the same kind. Checkpoint {record['checkpoint']}.\n"
                 f"{record['command']} · {args.command} · commit {record['commit']}")
    return fig, record
