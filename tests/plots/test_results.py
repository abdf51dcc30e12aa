import copy
import pickle

import cv2
import numpy as np
import pytest
import torch
from ultralytics import YOLO
from ultralytics.cfg import entrypoint
from ultralytics.engine.results import Results
from ultralytics.models.yolo.detect import DetectionPredictor
from ultralytics.utils import ROOT, YAML
from ultralytics.utils.plotting import Annotator, colors

from yolo_fewshot import FewShotYOLO
from yolo_fewshot.plots import results
from yolo_fewshot.plots.results import FewShotPredictor, FewShotResults

NAMES = {0: "car", 1: "person", 2: "bus", 3: "scooter", 4: "stroller", 5: "cart"}
ENROLLED = {"scooter": 5, "stroller": 1, "cart": 3}
BASE = [[30, 40, 150, 160, 0.9, 0], [200, 90, 300, 200, 0.5, 1]]
NOVEL = [[100.7, 100.2, 260.4, 220.9, 0.8, 3], [20, 150, 70, 230, 0.7, 4], [250, 30, 300, 75, 0.4, 3]]
MODES = [
    {},
    {"pil": True},
    {"color_mode": "instance"},
    {"line_width": 4, "font_size": 9, "conf": False},
    {"labels": False},
    {"labels": False, "conf": False, "pil": True, "line_width": 5},
]


def scene(h=240, w=320):
    return np.random.default_rng(0).integers(90, 160, (h, w, 3), dtype=np.uint8)


def pair(boxes, image=None, names=NAMES, enrolled=ENROLLED, ids=False):
    """The same detections as our results and as Ultralytics'."""
    data = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 6)
    if ids:
        data = torch.cat([data[:, :4], 11 + torch.arange(len(data))[:, None] * 3.0, data[:, 4:]], 1)
    given = {"orig_img": scene() if image is None else image, "path": "a/street.jpg", "names": names, "boxes": data}
    return FewShotResults(**given, enrolled=enrolled), Results(**given)


def array(image):
    return np.asarray(image).astype(int)


def differs(a, b):
    return np.abs(array(a) - array(b)).max(2) > 0


def edges(boxes, shape, reach):
    """Where the outlines of boxes may be."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    near = np.zeros(shape[:2], bool)
    for x1, y1, x2, y2 in (b[:4] for b in boxes):
        outside = np.maximum(np.maximum(x1 - x, x - x2), np.maximum(y1 - y, y - y2))
        near |= abs(outside) <= reach
    return near


def rectangle(mask):
    """The smallest rectangle around what is True: left, top, right and bottom."""
    y, x = mask.nonzero()
    return x.min(), y.min(), x.max() + 1, y.max() + 1


@pytest.fixture
def texts(monkeypatch):
    """The texts of the legend, in the order in which they are drawn."""
    seen, stock = [], Annotator.box_label

    def box_label(self, box, label="", color=(128, 128, 128), txt_color=(255, 255, 255)):
        if color == results.PLATE:
            seen.append(label)
        return stock(self, box, label, color, txt_color)

    monkeypatch.setattr(Annotator, "box_label", box_label)
    return seen


def legend_of(ours, monkeypatch, **kwargs):
    """Image, and the rectangle of the legend in it; None if there is none."""
    image = array(ours.plot(**kwargs))
    with monkeypatch.context() as m:
        m.setattr(results, "_add_legend", lambda *_: None)
        changed = differs(image, ours.plot(**kwargs))
    return image, rectangle(changed) if changed.any() else None


# Dashes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("boxes", "enrolled", "extra"),
    [(BASE, ENROLLED, {}), (BASE + NOVEL, {}, {}), ([], ENROLLED, {}), (BASE + NOVEL, ENROLLED, {"boxes": False})],
)
def test_without_enrolled_boxes_the_image_is_ultralytics_own(mode, boxes, enrolled, extra):
    ours, stock = pair(boxes, enrolled=enrolled)
    a, b = ours.plot(**mode, **extra), stock.plot(**mode, **extra)
    assert type(a) is type(b) and np.array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ids", [False, True])
def test_only_outlines_of_enrolled_boxes_and_the_legend_differ(mode, ids, monkeypatch):
    ours, stock = pair(BASE + NOVEL, ids=ids)
    kept = ours.orig_img.copy(), ours.boxes.data.clone()
    image, legend = legend_of(ours, monkeypatch, **mode)
    changed = differs(image, stock.plot(**mode))
    assert (legend is None) == (mode.get("labels") is False)
    if legend:
        changed[legend[1] : legend[3], legend[0] : legend[2]] = False
    assert changed.sum() > 100 and not (changed & ~edges(NOVEL, changed.shape, mode.get("line_width", 2) + 2)).any()
    assert np.array_equal(ours.orig_img, kept[0]) and torch.equal(ours.boxes.data, kept[1])
    assert np.array_equal(image, array(ours.numpy().plot(**mode)))


@pytest.mark.parametrize("pil", [False, True])
@pytest.mark.parametrize("lw", [None, 1, 2, 5, 9])
@pytest.mark.parametrize("size", [6, 13, 40, 161])
def test_every_side_has_dashes_and_gaps(size, lw, pil):
    box = [40, 30, 40 + size, 30 + size]
    ours, stock = pair([[*box, 0.9, 3]], np.full((240, 320, 3), 128, np.uint8))
    ours, stock = (array(x.plot(labels=False, conf=False, line_width=lw, pil=pil)) for x in (ours, stock))
    line, on, lw = differs(stock, 128), ~differs(stock, ours), lw or 2
    assert (line & on).any() and ((line & ~on).any() or size < lw)
    if size < 4 * lw:  # hardly longer than thick
        return
    assert not differs(ours, 128)[~on].any()  # dashes are Ultralytics' line, and in gaps is the image
    x1, y1, x2, y2 = box
    for side in (on[y1, x1 : x2 + 1], on[y2, x1 : x2 + 1], on[y1 : y2 + 1, x1], on[y1 : y2 + 1, x2]):
        assert side[0] and side[-1] and not side.all() and abs(side[: len(side) // 2].sum() - side.sum() / 2) <= 1.5
        ends = np.flatnonzero(np.diff(side.astype(int)))
        assert 0.25 * size < (~side).sum() <= 0.5 * size and np.diff(ends).max() <= 13 * lw
        assert size < 8 * lw or np.diff(ends)[::2].min() >= 2 * lw


def test_boxes_beyond_the_image():
    ours, stock = pair([[-30, -20, 90, 80, 0.9, 3], [200, 150, 400, 260, 0.8, 4]])
    changed = differs(ours.plot(labels=False), stock.plot(labels=False))
    assert changed.any() and not (changed & ~edges([[-30, -20, 90, 80], [200, 150, 400, 260]], (240, 320), 4)).any()


def test_a_label_over_a_box_is_drawn_as_by_ultralytics():
    ours, stock = pair([[60, 100, 200, 200, 0.5, 3], [60, 120, 200, 180, 0.9, 0]])  # the label of the car is on the box
    a, b = (x.plot(line_width=2) for x in (ours, stock))
    plate = (slice(104, 119), slice(64, 100))
    assert (array(b)[plate] == colors(0, True)).all(2).mean() > 0.3 and np.array_equal(a[plate], b[plate])


# Legend ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [{}, {"pil": True}, {"color_mode": "instance"}])
def test_the_legend_lists_the_enrolled_classes_of_the_image(mode, texts):
    ours, _ = pair(BASE + NOVEL, scene(480, 640))
    ours.plot(**mode)
    assert texts == ["scooter: enrolled, 5 shots", "stroller: enrolled, 1 shot"]
    ours[[0, 3]].plot(**mode)
    assert texts[2:] == ["stroller: enrolled, 1 shot"]


def test_no_legend_without_labels(texts):
    pair(BASE + NOVEL)[0].plot(labels=False)
    pair(BASE)[0].plot()
    assert not texts


@pytest.mark.parametrize(("classes", "rows"), [(10, 10), (13, 11)])
def test_the_legend_has_ten_classes_at_most(classes, rows, texts):
    names = {i: f"thing {i}" for i in range(classes)}
    boxes = [[20 * i, 50, 20 * i + 15, 90, 0.5, i] for i in names]
    pair(boxes, scene(480, 640), names, dict.fromkeys(names.values(), 2))[0].plot()
    assert texts[:10] == [f"thing {i}: enrolled, 2 shots" for i in range(10)] and len(texts) == rows
    assert texts[10:] == ["+ 3 more"] * (classes == 13)


@pytest.mark.parametrize("pil", [False, True])
@pytest.mark.parametrize("shape", [(90, 160), (160, 120), (480, 640), (1080, 1000)])
def test_the_legend_fits_and_can_be_read(shape, pil, texts, monkeypatch):
    names = {**NAMES, 3: "wheelchair that is pushed by a person"}
    enrolled = {**ENROLLED, names[3]: 12}
    h, w = shape
    boxes = [[0.2 * w, 0.3 * h, 0.5 * w, 0.8 * h, 0.9, 3], [0.6 * w, 0.4 * h, 0.9 * w, 0.9 * h, 0.9, 4]]
    image, (x1, y1, x2, y2) = legend_of(pair(boxes, scene(h, w), names, enrolled)[0], monkeypatch, pil=pil)
    assert 12 <= (y2 - y1) / 2 <= h / 4 and x2 - x1 < w and min(x1, w - x2) < 0.01 * w + 5 > min(y1, h - y2)
    assert np.median(image[y1:y2, x1:x2]) == 255
    long, short = texts
    assert long.endswith(": 12 shots" if w < 300 else f"{names[3]}: enrolled, 12 shots") and long[:6] == "wheelc"
    assert short in {"stroller: enrolled, 1 shot", "stroller: 1 shot"}


@pytest.mark.parametrize("shape", [(8, 8), (24, 300), (300, 24)])
@pytest.mark.parametrize("pil", [False, True])
def test_an_image_too_small_for_a_legend_has_none(shape, pil, texts):
    h, w = shape
    ours, _ = pair([[1, 1, w - 2, h - 2, 0.9, 3]], scene(h, w))
    assert ours.plot(pil=pil, line_width=2) is not None and not texts


@pytest.mark.parametrize("free", range(4))
def test_the_legend_takes_the_corner_where_it_hides_least(free, monkeypatch):
    corners = [(0, 400), (540, 400), (0, 40), (540, 40)]
    boxes = [[x, y, x + 100, y + 75, 0.5, 3] for i, (x, y) in enumerate(corners) if i != free]
    _, (x1, y1, x2, y2) = legend_of(pair(boxes, scene(480, 640))[0], monkeypatch)
    assert (x1 < 10, x2 > 630) == (free % 2 == 0, free % 2 == 1)
    assert (y1 < 10, y2 > 470) == (free > 1, free < 2)


@pytest.mark.parametrize(("mode", "color"), [("class", colors(4, True)), ("instance", results.INK)])
def test_the_sample_is_dashed_in_the_color_of_the_class(mode, color, monkeypatch):
    ours, _ = pair([[100, 100, 150, 150, 0.5, 4]], scene(480, 640))
    image, (x1, y1, _, y2) = legend_of(ours, monkeypatch, color_mode=mode)
    sample = (image[(y1 + y2) // 2, x1 : x1 + 34] == color).all(1).astype(int)
    assert (np.diff(sample, prepend=0) > 0).sum() == 2 and sample.sum() > 10


# All the rest of Results ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r[1:],
        lambda r: r[3],
        lambda r: r[torch.tensor([3, 1])],
        lambda r: r[np.array([True] * 5)],
        lambda r: r.cpu(),
        lambda r: r.numpy(),
        lambda r: r.to("cpu"),
        lambda r: r.to(dtype=torch.float16),
        lambda r: r.new(),
        copy.deepcopy,
        lambda r: pickle.loads(pickle.dumps(r)),
    ],
)
def test_parts_and_copies_keep_the_enrolled_classes(change):
    ours, stock = map(change, pair(BASE + NOVEL))
    assert type(ours) is FewShotResults and ours.enrolled == ENROLLED and type(stock) is Results
    assert ours.path == stock.path and len(ours) == len(stock)
    assert differs(ours.plot(), stock.plot()).any() == (len(ours) > 0)


def test_everything_but_the_image_is_ultralytics_own(tmp_path):
    written = []
    for i, result in enumerate(pair(BASE + NOVEL, ids=True)):
        root = tmp_path / str(i)
        result.save_txt(root / "labels.txt", save_conf=True)
        result.save_crop(root / "crops", "a.jpg")
        files = {f.relative_to(root): f.read_bytes() for f in root.rglob("*") if f.is_file()}
        written.append((result.verbose(), result.summary(), result.to_json(), result.speed, len(result), files))
    assert written[0] == written[1] and len(written[0][-1]) == 6


def test_saving_and_showing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = []
    monkeypatch.setattr(Annotator, "show", lambda self, title: shown.append((title, self.result().copy())))
    ours, _ = pair(BASE + NOVEL)
    image = ours.plot()
    assert ours.save("deep/found.png", conf=True) == "deep/found.png"
    assert np.array_equal(cv2.imread("deep/found.png"), image)
    assert ours.save() == "results_street.jpg" and {f.name for f in tmp_path.iterdir()} == {
        "deep",
        "results_street.jpg",
    }
    ours.show()
    ((title, seen),) = shown
    assert title == "a/street.jpg" and np.array_equal(seen, image)


# Prediction -----------------------------------------------------------------------------------------------------------

SETTINGS = {"imgsz": 64, "conf": 1e-6, "max_det": 20, "verbose": False}


@pytest.fixture(scope="module")
def root(tmp_path_factory, draw_tiny):
    """Images, a support set of two crops of a scooter and one of a cart, a video and two models."""
    torch.manual_seed(0)
    root = draw_tiny(tmp_path_factory.mktemp("results"), 3)
    images = [cv2.imread(str(f)) for f in sorted((root / "images/val").iterdir())]
    for name in ("scooter/0", "scooter/1", "cart/2"):
        file = root / f"shots/{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(file), images[int(name[-1])][4:44, 4:44])
    video = cv2.VideoWriter(str(root / "video.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 5, (320, 320))
    for _ in range(3):
        video.write(cv2.resize(images[0], (320, 320)))
    video.release()
    for family in ("yolo11", "yolo26"):
        model = FewShotYOLO(root / f"{family}n-tiny.yaml")
        for bank in model.model.model[-1].branch_prototypes:
            bank.offset.fill_(-5)  # random weights prefer the enrolled classes then
        model.save(root / f"{family}.pt")
    return root


@pytest.fixture(params=["yolo11", "yolo26"])
def model(request, root):
    return FewShotYOLO(root / f"{request.param}.pt")


def novel(found):
    return {found.names[int(c)] for c in found.boxes.cls} & {"scooter", "cart"}


def test_only_few_shot_models_get_the_predictor(model):
    assert model._smart_load("predictor") is FewShotPredictor
    assert YOLO("yolo11n.yaml")._smart_load("predictor") is DetectionPredictor
    assert model.fold()._smart_load("predictor") is DetectionPredictor


def test_predictions_have_the_enrolled_classes(model, root, tmp_path):
    image = scene()
    (plain,) = model(image, **SETTINGS)
    assert type(plain) is FewShotResults and plain.enrolled == {} and len(plain)
    assert np.array_equal(plain.plot(), Results.plot(plain))
    stream = model.predict([image] * 2, support=root / "shots", enroll="mean", stream=True, **SETTINGS)
    model.save(tmp_path / "site.pt")
    for x in [*stream, *model(image, **SETTINGS), *YOLO(tmp_path / "site.pt")(image, **SETTINGS)]:
        assert type(x) is FewShotResults and x.enrolled == {"scooter": 2, "cart": 1} and novel(x)
        drawn = x.plot(labels=False)
        assert differs(drawn, Results.plot(x, labels=False)).any()
    assert np.array_equal(drawn, model(image, **SETTINGS)[0].plot(labels=False))


def test_tracking_a_video(model, root, texts, tmp_path):
    pytest.importorskip("lap")
    low = dict.fromkeys(("track_high_thresh", "track_low_thresh", "new_track_thresh"), 0.0)
    YAML.save(tmp_path / "t.yaml", {**YAML.load(ROOT / "cfg/trackers/bytetrack.yaml"), **low, "fuse_score": False})
    out = {"save": True, "project": str(tmp_path), "name": "found", "tracker": tmp_path / "t.yaml", "stream": True}
    frames = list(model.track(root / "video.avi", support=root / "shots", enroll="mean", **out, **SETTINGS))
    assert [type(x) for x in frames] == [FewShotResults] * 3 and all(x.boxes.is_track for x in frames)
    assert all(x.enrolled == {"scooter": 2, "cart": 1} and novel(x) for x in frames)
    assert len(texts) >= 3 and set(texts) <= {"scooter: enrolled, 2 shots", "cart: enrolled, 1 shot"}
    assert (tmp_path / "found/video.avi").stat().st_size > 1000


@pytest.mark.parametrize(("settings", "rows"), [("", {"scooter", "cart"}), ("show_labels=False", set())])
def test_the_command_line(settings, rows, root, texts, tmp_path):
    image = root / "image.png"
    cv2.imwrite(str(image), scene(320, 320))
    entrypoint(
        f"yolo predict model={root}/yolo11.pt source={image} support={root}/shots enroll=mean imgsz=64 conf=0.0 "
        f"max_det=20 save=True project={tmp_path} name=found {settings}".strip()
    )
    assert {x.partition(":")[0] for x in texts} <= rows and bool(texts) == bool(rows)
    assert cv2.imread(str(tmp_path / "found/image.jpg")).shape == (320, 320, 3)
