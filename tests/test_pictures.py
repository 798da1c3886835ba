"""Tests of pictures.py: the method figure and what all figures share."""

import json

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import FancyArrowPatch
from test_figures import check_files, draw

from common import UserError
from paper import figures, pictures
from paper.figures import main


def test_running_mean_by_hand():
    np.testing.assert_allclose(pictures.running_mean([1, 2, 6, 4], 2), [1, 1.5, 4, 5])
    np.testing.assert_allclose(pictures.running_mean([1, 2, 6], 1), [1, 2, 6])


def test_method_figure(tmp_path, capsys):
    out = main(["method", "--out", str(tmp_path)])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["figure"] == "method"
    check_files(out, tmp_path, "method")
    first = (tmp_path / "method.svg").read_bytes()
    main(["method", "--out", str(tmp_path)])
    assert (tmp_path / "method.svg").read_bytes() == first  # no date, no random names: it can be committed
    assert (pictures.ANSWER, pictures.VECTOR) == (figures.METHODS["icl"][0], figures.METHODS["mend"][0])


def test_method_figure_has_no_overlaps():
    """No text leaves the canvas or touches a text or an edge; all are readable at 400 pixels."""
    fig, _ = draw("method")
    renderer = FigureCanvasAgg(fig).get_renderer()
    texts = [t for t in fig.axes[0].texts if t.get_text()]
    boxes = [t.get_window_extent(renderer) for t in texts]
    shapes = [p.get_window_extent(renderer) for p in fig.axes[0].patches
              if not isinstance(p, FancyArrowPatch)]
    for i, (text, box) in enumerate(zip(texts, boxes, strict=True)):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= fig.bbox.width and box.y1 <= fig.bbox.height, text
        assert text.get_fontsize() / 72 / fig.get_figwidth() * 400 >= 9, text
        assert not any(box.overlaps(other) for other in boxes[i + 1:]), text
        for shape in shapes:
            inside = shape.x0 <= box.x0 and box.x1 <= shape.x1 and shape.y0 <= box.y0 and box.y1 <= shape.y1
            assert inside or not box.overlaps(shape), text


def test_palette_tells_methods_apart():
    colours, markers, labels = zip(*figures.METHODS.values(), strict=True)
    assert all(len(set(part)) == len(figures.METHODS) for part in (colours, markers, labels))


def lines(method: str, headlines: tuple[float, ...], distill_len: int, tokens: int = 96) -> list[dict]:
    return [{"method": method, "task": f"t{i}", "seed": 100, "headline": headline, "n": 8, "k": 16,
             "distill_len": distill_len, "demo_tokens": tokens, "tasks": "functions", "llm": "L",
             "commit": "c"}
            for i, headline in enumerate(headlines)]


def test_gains_by_ratio_by_hand(tmp_path):
    both = [*lines("zero_shot", (0.1, 0.2), 32), *lines("icl", (0.5, 0.6), 32)]
    mend = [*lines("mend", (0.3, 0.4), 32), *lines("mend", (0.1, 0.2), 16)]
    drawn = pictures.gains_by_ratio([*both, *mend, *lines("majority", (1, 1), 32)])
    assert drawn.keys() == {"mend"}
    np.testing.assert_allclose(drawn["mend"], [(3, 50), (6, 0)])
    cut = [r | {"segments": 2} for r in [*both, *mend]]  # twice as many vectors
    np.testing.assert_allclose(pictures.gains_by_ratio(cut)["mend"], [(1.5, 50), (3, 0)])
    with pytest.raises(UserError, match="--segments auto: no ratio"):
        pictures.gains_by_ratio([r | {"segments": "auto"} for r in cut])

    path = tmp_path / "ratios-functions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [*both, *mend]))
    out = main(["ratios", "--results", str(path), "--out", str(tmp_path)])
    check_files(out, tmp_path, "ratios")
    np.testing.assert_allclose(out["drawn"]["ratios-functions"]["mend"], [(3, 50), (6, 0)])
    path.write_text("".join(json.dumps(line) + "\n" for line in mend))
    with pytest.raises(UserError, match="ratios-functions lacks icl"):
        main(["ratios", "--results", str(path), "--out", str(tmp_path)])
