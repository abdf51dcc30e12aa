import cv2
import numpy as np
import pytest
from ultralytics.utils.plotting import Annotator, colors

from yolo_fewshot.enroll.enroll import Shot, Shots
from yolo_fewshot.plots import support as module
from yolo_fewshot.plots.support import CELL, COLUMNS, FRAME, GAP, HEAD, LEFT, LINE, ROW, plot_support

NAMES = {4: "dog", 5: "ant", 6: "bee", 7: "cat"}  # of the model
STRIP = 2 * LINE  # height of the texts below a shot


@pytest.fixture
def painted(tmp_path):
    """A function that paints an image of 200 x 100 with an object in a gray of its own, and returns it as a shot."""

    def shot(gray, box=(80, 30, 120, 70), suspect=False, own=0.5, other=0.75, nearest="bee"):
        file = tmp_path / f"{gray}.png"
        image = np.full((100, 200, 3), 255, np.uint8) if not file.exists() else cv2.imread(str(file))
        x1, y1, x2, y2 = box
        image[y1:y2, x1:x2] = gray
        assert cv2.imwrite(str(file), image)
        return Shot(str(file), [x1 / 200, y1 / 100, x2 / 200, y2 / 100], own, other, nearest, suspect)

    return shot


@pytest.fixture
def texts(monkeypatch):
    """The lines that are written, as (text, x, y)."""
    seen, write = [], Annotator.text

    def text(self, xy, text, *args, **kwargs):
        seen.append((text, *xy))
        write(self, xy, text, *args, **kwargs)

    monkeypatch.setattr(Annotator, "text", text)
    return seen


def draw(tmp_path, **objects):
    """Draw classes and return the image."""
    classes = {n: {"shots": len(x), "method": "fit", "conf": 0.25, "replaced": None} for n, x in objects.items()}
    assert plot_support(Shots(classes, objects), NAMES, tmp_path / "runs/check.png")
    assert [x.name for x in (tmp_path / "runs").iterdir()] == ["check.png"]
    data = (tmp_path / "runs/check.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)


def corner(row, column):
    return HEAD + row * ROW, LEFT + column * (CELL + GAP)


def cell(table, row, column):
    y, x = corner(row, column)
    return table[y : y + CELL, x : x + CELL]


def grays(table):
    """The color in the middle of every cell, row by row; white where there is none."""
    rows, columns = (table.shape[0] - HEAD) // ROW, (table.shape[1] - LEFT) // (CELL + GAP)
    return [[int(np.median(cell(table, r, c)[50:70, 50:70])) for c in range(columns)] for r in range(rows)]


def is_red(table):
    return (table == (0, 0, 255)).all(2)


def test_classes_and_shots_to_be_checked_come_first_and_the_others_as_given(painted, tmp_path, texts):
    table = draw(
        tmp_path,
        dog=[painted(10), painted(20)],
        ant=[painted(30), painted(40), painted(50, suspect=True), painted(60, suspect=True)],
        bee=[painted(70)],
        cat=[painted(80, suspect=True), painted(90)],
    )
    assert grays(table) == [[50, 60, 30, 40], [80, 90, 255, 255], [10, 20, 255, 255], [70, 255, 255, 255]]
    assert [x[0] for x in texts if x[0] in NAMES.values() and x[1] < LEFT] == ["ant", "cat", "dog", "bee"]


def test_suspect_shots_alone_have_a_red_frame(painted, tmp_path):
    table = draw(tmp_path, bee=[painted(10), painted(20, suspect=True)], cat=[painted(30), painted(40)])
    red, (y, x) = is_red(table), corner(0, 0)
    outer = red[y - FRAME : y + CELL + STRIP + FRAME, x - FRAME : x + CELL + FRAME]
    assert outer[:FRAME].all() and outer[-FRAME:].all() and outer[:, :FRAME].all() and outer[:, -FRAME:].all()
    assert outer.sum() == red.sum() and not is_red(cell(table, 0, 0)).any()
    assert not is_red(draw(tmp_path, bee=[painted(10)])).any()


def test_an_object_is_shown_with_its_surroundings_and_its_box_in_the_color_of_its_class(painted, tmp_path):
    table = draw(tmp_path, dog=[painted(10)], cat=[painted(20), painted(30, box=(180, 40, 200, 60))])
    for r, c, index, expected in ((0, 0, 4, (22, 97)), (1, 0, 7, (22, 97)), (1, 1, 7, (45, 119))):
        found = (np.abs(cell(table, r, c).astype(int) - colors(index, True)).max(2) < 60).any(0)
        assert np.flatnonzero(found)[[0, -1]].tolist() == pytest.approx(expected, abs=3)  # 75 of 120 pixels
        assert (table[corner(r, 0)[0], GAP : GAP + FRAME] == colors(index, True)).all()
    assert (cell(table, 0, 0)[:10] == 255).all()  # the paper of the image
    assert cell(table, 1, 1)[60, 60:110].mean() == pytest.approx(30, abs=1)  # an object at the edge of its image


def test_a_crop_is_shown_whole(tmp_path, painted):
    table = draw(tmp_path, ant=[painted(50, box=(0, 0, 200, 100))])
    shown = cell(table, 0, 0)
    assert (shown[:30] == module.PAPER).all() and (shown[-30:] == module.PAPER).all()
    assert (shown[35:-35, 5:-5] == 50).all()


def test_similarities_are_written_below_their_shots(painted, tmp_path, texts):
    shots = painted(10, own=0.614), painted(20, own=None), painted(30, own=-0.4, other=0.918, suspect=True)
    draw(tmp_path, ant=list(shots))
    (y, first), (_, second), (_, third) = (corner(0, c) for c in range(3))
    found = [x[0] for c in (first, second, third) for x in texts if y + CELL <= x[2] and c <= x[1] < c + CELL]
    assert found == ["-0.40, but 0.92 to", "bee", "0.61", "-"]
    assert [x[0] for x in texts if x[1] < LEFT and x[2] >= HEAD] == ["ant", "3 shots, fit", "conf 0.25"]


def test_shots_beyond_ten_are_counted_and_not_read(painted, tmp_path, texts, monkeypatch):
    shots, read = [painted(10 + i, suspect=i == 12) for i in range(13)], module.imread
    seen = []
    monkeypatch.setattr(module, "imread", lambda file: seen.append(file) or read(file))
    table = draw(tmp_path, cat=shots, dog=[painted(100)] * COLUMNS)
    assert grays(table) == [[22, *range(10, 19)], [100] * 10] and COLUMNS == 10
    assert seen == [shots[12].file, *(x.file for x in shots[:9]), str(tmp_path / "100.png")]
    right = LEFT + 10 * (CELL + GAP)
    assert [x[0] for x in texts if x[1] >= right] == ["+ 3 more"]
    assert (table[HEAD : HEAD + ROW, right:] < 200).any() and (table[HEAD + ROW :, right:] == 255).all()


def test_classes_beyond_the_last_row_are_named(painted, tmp_path, texts, monkeypatch):
    monkeypatch.setattr(module, "ROWS", 2)
    objects = {"dog": [painted(10)], "ant": [painted(20)], "bee": [painted(30)], "cat": [painted(40, suspect=True)]}
    table = draw(tmp_path, **objects)
    assert [row[0] for row in grays(table)] == [40, 10]
    assert texts[-1][0] == "Not drawn: ant, bee" and texts[-1][2] >= HEAD + 2 * ROW


def test_names_of_any_length_and_script(painted, tmp_path, texts, monkeypatch):
    long = "a very long name of a class, " * 12
    monkeypatch.setattr(module, "colors", lambda i, bgr: (9, 9, 9))
    names = {0: long, 1: "größe 大"}
    objects = {long: [painted(10, nearest=long, suspect=True)], names[1]: [painted(20)]}
    classes = {n: {"shots": 1, "method": "mean", "conf": None} for n in objects}
    assert plot_support(Shots(classes, objects), names, tmp_path / "a.png")
    left, below = ([x for x in texts if x[2] >= HEAD and (x[1] < LEFT) == side] for side in (True, False))
    assert len([x for x in left if x[2] < HEAD + ROW]) == CELL // LINE and left[CELL // LINE - 1][0].endswith("…")
    assert len(below) == 3 and below[1][0].endswith("…")
    assert [x[0] for x in left[-3:]] == [names[1], "1 shot, mean", "conf -"]
    y, x = corner(0, 0)
    table = cv2.imread(str(tmp_path / "a.png"))
    assert (table[y : y + ROW - GAP, x + CELL + FRAME :] == 255).all()  # no text runs out of its cell
    assert (table[y : y + ROW - GAP, x - GAP : x - FRAME] == 255).all()


def test_an_error_is_a_warning(painted, tmp_path, caplog):
    shots = Shots({"ant": {"shots": 1, "method": "fit", "conf": None}}, {"ant": [painted(10)]})
    (tmp_path / "10.png").unlink()
    assert not plot_support(shots, NAMES, tmp_path / "a.png")
    painted(10)
    (tmp_path / "file").touch()
    assert not plot_support(shots, NAMES, tmp_path / "file/a.png")
    assert [r.message for r in caplog.records if r.levelname == "INFO"] == [
        f"Plotting support set to {tmp_path / x}... " for x in ("a.png", "file/a.png")
    ]
    first, second = (r.message for r in caplog.records if r.levelname == "WARNING")
    assert f"Plotting error for {tmp_path / 'a.png'}: {tmp_path / '10.png'} cannot be read" in first
    assert f"Plotting error for {tmp_path / 'file/a.png'}: " in second
    assert sorted(x.name for x in tmp_path.iterdir()) == ["10.png", "file"]


@pytest.mark.parametrize("kind", ["gray.png", "alpha.png", "five.tiff"])
def test_images_of_other_channels_are_drawn(tmp_path, kind):
    file, shape = tmp_path / kind, {"gray.png": (100, 200), "alpha.png": (100, 200, 4)}.get(kind)
    if shape:
        assert cv2.imwrite(str(file), np.full(shape, 60, np.uint8))
    else:  # a page for each channel
        assert cv2.imwritemulti(str(file), [np.full((100, 200), 60 + i, np.uint8) for i in range(5)])
    table = draw(tmp_path, dog=[Shot(str(file), [0.4, 0.3, 0.6, 0.7], 0.5, None, None, False)])
    assert grays(table)[0][0] == pytest.approx(60, abs=2)
