"""Our own method figure, the paper's Figs. 1 and 2 in one: `python figures.py method` draws it.

The canvas is 100 units wide and 86 high; a unit is 0.08 inch, so that 14-point text is 2.4 units high and can be read
at 400 pixels.
"""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

INK, GREY = "#222222", "#666666"
DEMO, ANSWER = "#F8DCC8", "#D55E00"      # Vanilla ICL's colour of figures.METHODS, and a tint of it
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


def draw() -> Figure:
    """Teacher and student above, the two stages below."""
    fig = Figure(figsize=(8, 6.88), facecolor="white")  # white, so that it stands on a dark page too
    ax = fig.add_axes((0, 0, 1, 1), xlim=(0, 100), ylim=(0, 86))
    ax.axis("off")
    reading(ax)
    stages(ax)
    return fig
