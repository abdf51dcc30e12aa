import cv2
import numpy as np
import pytest
import torch
from ultralytics.utils.plotting import colors

from yolo_fewshot.plots.episode import CELL, GAP, HEADER, plot_episode

NAMES = {3: "ant", 5: "bee", 6: "cat"}


@pytest.fixture
def episode():
    """Two ways of two support images and one query image each, 40 x 80, each of a gray of its own."""
    way, support = [3, 3, 5, 5, 3, 5], [True] * 4 + [False] * 2
    gray = torch.linspace(0.2, 0.7, 6)[:, None, None, None]
    objects = [
        (0, 3, 0.25),
        (0, 6, 0.75),
        (1, 3, 0.25),
        (2, 5, 0.25),
        (3, 5, 0.25),
        (4, 3, 0.25),
        (4, 6, 0.75),
        (5, 5, 0.75),
    ]
    image, cls, x = zip(*objects)
    return {
        "img": gray.expand(6, 3, 40, 80),
        "cls": torch.tensor(cls)[:, None].float(),
        "bboxes": torch.tensor([[v, 0.75, 0.3, 0.3] for v in x]),
        "batch_idx": torch.tensor(image).float(),
        "support": torch.tensor(support),
        "way": torch.tensor(way),
    }


def cells(file, row, column):
    """The cell of a row and column of a written image; the third column is that of the query images."""
    table = cv2.imread(str(file))
    h, w = CELL // 2, CELL
    assert table.shape == (HEADER + 2 * h, 3 * w + GAP, 3)
    x = column * w + GAP * (column == 2)
    return table[HEADER + row * h : HEADER + (row + 1) * h, x : x + w]


def drawn(cell, c):
    """Where the color of a class is, as parts of the width; None if it is nowhere."""
    near = np.abs(cell.astype(int) - np.array(colors(c, True))).max(2) < 60
    near[: CELL // 4] = False  # above the boxes there are labels
    return (np.flatnonzero(near.any(0))[[0, -1]] / CELL).round(1).tolist() if near.sum() > 30 else None


def test_a_row_has_the_support_objects_of_its_class_and_its_query_images(episode, tmp_path):
    plot_episode(episode, NAMES, tmp_path / "e.jpg")
    left, right = [0.1, 0.4], [0.6, 0.9]
    first, second, query = (cells(tmp_path / "e.jpg", 0, i) for i in range(3))
    assert drawn(first, 3) == drawn(second, 3) == left and drawn(first, 6) is None  # of another class than the row's
    assert drawn(query, 3) == left and drawn(query, 6) == right
    bee = [cells(tmp_path / "e.jpg", 1, i) for i in range(3)]
    assert [drawn(x, 5) for x in bee] == [left, left, right]
    for i, cell in zip((0, 1, 4, 2, 3, 5), (first, second, query, *bee)):
        assert np.median(cell) == pytest.approx(255 * float(episode["img"][i, 0, 0, 0]), abs=3)


def test_detections_take_the_place_of_the_labels_of_query_images(episode, tmp_path):
    found = [torch.tensor([[48.0, 20, 72, 36, 0.9, 6]]), torch.zeros(0, 6)]
    plot_episode(episode, NAMES, tmp_path / "e.jpg", found)
    query, empty = (cells(tmp_path / "e.jpg", i, 2) for i in range(2))
    assert drawn(query, 6) == [0.6, 0.9] and drawn(query, 3) is None and drawn(empty, 5) is None
    assert drawn(cells(tmp_path / "e.jpg", 0, 0), 3) == [0.1, 0.4]


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_images_of_other_channels_are_plotted_as_by_ultralytics(episode, tmp_path, channels):
    shades = torch.tensor([0.2, 0.4, 0.6, 0.8, 1.0])[:channels, None, None]
    episode["img"] = shades.expand(6, -1, 40, 80)
    plot_episode(episode, NAMES, tmp_path / "e.jpg")
    red, green, blue = {1: (51, 51, 51), 2: (51, 102, 0)}.get(channels, (51, 102, 153))
    for row, column in ((0, 0), (1, 2)):
        shown = np.median(cells(tmp_path / "e.jpg", row, column).reshape(-1, 3), 0)
        assert shown == pytest.approx([blue, green, red], abs=4)


def test_boxes_to_ignore_are_named_so(episode, tmp_path):
    episode["cls"][5] = -1
    plot_episode(episode, NAMES, tmp_path / "e.jpg")
    assert drawn(cells(tmp_path / "e.jpg", 0, 2), -1) == [0.1, 0.4]
