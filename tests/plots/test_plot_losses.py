import cv2
import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from yolo_fewshot.plots.losses import plot_losses

STAGE1 = ("box", "cls", "dfl")
STAGE2 = (*STAGE1, "epi", "sup", "cpe", "tri")
DUAL = ("box", "cls", "l1", "epi", "sup", "cpe", "tri")
EVENTS = ("clipped", "skipped", "overflows", "sides_clamped", "means_clamped")


def shares_of(terms):
    """Gradient shares of the terms, each larger than the one before."""
    return np.arange(1, len(terms) + 1) / sum(range(len(terms) + 1))


def columns(terms, epochs, **values):
    """Columns of results.csv, every one with values of its own."""
    n = range(epochs)
    shares = shares_of(terms)
    out = {"epoch": [i + 1 for i in n], "time": [1.5 * i for i in n], "train/grad_norm": [2.0 + i for i in n]}
    for j, t in enumerate(terms):
        out[f"train/{t}_loss"] = [j + 1 / (i + 1) for i in n]
        out[f"val/{t}_loss"] = [9.0] * epochs
        out[f"grad/{t}"], out[f"share/{t}"] = [j + i + 0.5 for i in n], [shares[j]] * epochs
        out[f"chance/{t}"] = [j + 0.25] * epochs
    return {**out, **{f"train/{k}": [j * i for i in n] for j, k in enumerate(EVENTS)}, **values}


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    saved, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: saved.append(self) or save(self, file, dpi=40))
    return saved


def test_the_right_axis_has_the_values_without_the_gain(tmp_path, figures):
    plot_losses(columns(STAGE2, 3), tmp_path / "losses.png", {"sup": 1.2, "cpe": 0.0, "tri": None})
    (figure,) = figures
    right = {ax.get_title(): ax.child_axes for ax in figure.axes if ax.child_axes}
    assert list(right) == ["sup_loss"]
    (parent,) = (ax for ax in figure.axes if ax.get_title() == "sup_loss")
    (raw,) = right["sup_loss"]
    assert raw.get_ylim() == pytest.approx([x / 1.2 for x in parent.get_ylim()])
    assert raw.get_ylabel() == "without gain 1.2"


def curve(ax, label):
    (line,) = [x for x in ax.lines if x.get_label() == label]
    return list(line.get_ydata())


@pytest.mark.parametrize("terms", [STAGE1, STAGE2, DUAL])
@pytest.mark.parametrize("epochs", [1, 4])
def test_every_column_is_drawn(tmp_path, figures, terms, epochs):
    results, file = columns(terms, epochs), tmp_path / "losses.png"
    open_before = plt.get_fignums()
    plot_losses(results, file)
    image = cv2.imread(str(file))
    palette = [np.array(plt.get_cmap("tab10")(i)[2::-1]) * 255 for i in range(len(terms))]
    areas = np.array([(np.abs(image - color).max(2) < 3).sum() for color in palette])
    assert areas / areas.sum() == pytest.approx(shares_of(terms), abs=0.05)
    assert plt.get_fignums() == open_before
    (figure,) = figures
    axes = [ax for ax in figure.axes if ax.get_visible()]
    assert len(axes) == 3 + len(terms) and len(figure.axes) - len(axes) <= 1
    share, norm, events, *each = axes
    assert [t.get_text() for t in share.get_legend().get_texts()] == list(terms[::-1])  # as they lie on each other
    tops = [area.get_paths()[0].get_extents() for area in share.collections[-len(terms) :]]
    for top, area in zip(shares_of(terms).cumsum(), tops):
        assert area.y1 == pytest.approx(top) and area.x1 > area.x0  # one epoch is seen, too
    for t in terms:
        assert curve(norm, t) == results[f"grad/{t}"]
    assert curve(norm, "all weights") == results["train/grad_norm"] and norm.get_yscale() == "log"
    for k in EVENTS:
        assert curve(events, k.replace("_", " ")) == results[f"train/{k}"]
    assert [ax.get_title() for ax in each] == [f"{t}_loss" for t in terms]
    for t, ax in zip(terms, each):
        assert curve(ax, "train") == results[f"train/{t}_loss"]
        assert curve(ax, "chance") == results[f"chance/{t}"]
    assert all(list(ax.lines[0].get_xdata()) == results["epoch"] for ax in (norm, events, *each))


def test_zeros_are_drawn_and_no_chance_level_that_is_zero(tmp_path, figures):
    """A term that is switched off, or an epoch whose measurements were all left out."""
    zero = {k: [0.0, 0.0] for k in ("grad/sup", "share/sup", "chance/sup", "train/sup_loss")}
    plot_losses(columns(STAGE2, 2, **zero), tmp_path / "losses.png")
    axes = {ax.get_title(): ax for ax in figures[0].axes}
    assert [x.get_label() for x in axes["sup_loss"].lines] == ["train"]
    assert [x.get_label() for x in axes["cls_loss"].lines] == ["train", "chance"]
    assert all(v > 0 for v in curve(axes["gradient norm"], "sup"))  # its axis is logarithmic
