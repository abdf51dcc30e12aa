"""What the page of the studio does, without a page."""

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from test_rows import stock_of
from ultralytics import YOLO

from yolo_fewshot import FewShotYOLO
from yolo_fewshot.data.demo import BASE
from yolo_fewshot.data.support import read_support
from yolo_fewshot.nn.rows import class_rows
from yolo_fewshot.studio import scenes
from yolo_fewshot.studio.engine import Studio
from yolo_fewshot.studio.found import CONF, CONF_MIN, Found, as_sure_as_of_shots, uncertainty
from yolo_fewshot.studio.learning import Figures
from yolo_fewshot.studio.project import iou
from yolo_fewshot.studio.scenes import _in_image

SIZE = 160


@pytest.fixture(scope="module")
def shots(demo):
    """Images of the demo data, and their objects of new classes: name, and corners in 0..1."""
    support = read_support("fewshot-demo-novel.yaml", dict(enumerate(BASE)))
    images = []
    for x in support.labels:
        c, half = x["bboxes"][:, :2], x["bboxes"][:, 2:] / 2
        corners = np.concatenate([c - half, c + half], 1).tolist()
        boxes = [(support.names[int(i)], tuple(b)) for i, b in zip(x["cls"].flat, corners) if i >= len(BASE)]
        images.append((Path(x["im_file"]), boxes))
    return images


@pytest.fixture(scope="module")
def checkpoints(trained, tmp_path_factory):
    """The same detector with a few-shot and with a stock head."""
    folded = tmp_path_factory.mktemp("stock") / "stock.pt"
    FewShotYOLO(trained[1].best).fold().save(folded)
    return {"few-shot": trained[1].best, "stock": folded}


@pytest.fixture
def start(checkpoints, tmp_path):
    """A function that opens a studio on a new project; all are closed at the end."""
    opened = []

    def start(head="few-shot", images=(), folder="project"):
        studio = Studio(checkpoints[head], tmp_path / folder, imgsz=SIZE, device="cpu")
        opened.append(studio)
        studio.keys = [studio.add(f.read_bytes(), f.name) for f, _ in images]
        return studio

    yield start
    for studio in opened:
        studio.close()


def label_all(studio, images):
    for key, (_, boxes) in zip(studio.keys, images):
        for name, box in boxes:
            studio.label(key, name, box, snap=False)


@pytest.mark.parametrize("head", ["few-shot", "stock"])
def test_it_learns_as_enroll_does_from_the_files_it_wrote(head, start, shots, checkpoints, monkeypatch):
    monkeypatch.setattr(scenes, "ANCHORS_PER_VIEW", 10**6 if head == "stock" else 512)
    studio = start(head, shots[:4])  # a power of two: all of them have a part in the statistics
    label_all(studio, shots[:4])
    studio.learn()
    built = studio.build().model
    oracle = FewShotYOLO(checkpoints[head])
    oracle.enroll(studio.project.data, imgsz=SIZE, method="fit", device="cpu")
    assert dict(built.names) == dict(oracle.model.names)
    rows, expected = class_rows(built), class_rows(oracle.model)
    for name in studio.learned.names:
        index = next(i for i, n in built.names.items() if n == name)
        for (w, b), (v, o) in zip(rows.get(index), expected.get(index)):
            scale = v.norm()
            assert (w - v).norm() < 0.02 * scale, name
            torch.testing.assert_close(b, o, atol=0.05, rtol=0.02)
        assert built.enrolled[name]["shots"] == oracle.model.enrolled[name]["shots"]


@pytest.mark.parametrize("head", ["few-shot", "stock"])
def test_the_saved_model_finds_what_was_shown(head, start, shots, tmp_path):
    studio = start(head, shots[:6])
    label_all(studio, shots[:3])
    studio.learn()
    studio.refresh()
    model = YOLO(studio.save(tmp_path / "site.pt"))
    compared = 0
    for key, (file, _) in zip(studio.keys, shots):
        result = model.predict(str(file), imgsz=SIZE, conf=0.02, device="cpu", verbose=False, save=False)[0]
        boxes = (result.boxes.xyxy / SIZE).tolist()
        rows = [(result.names[int(c)], p, tuple(b)) for c, p, b in zip(result.boxes.cls, result.boxes.conf, boxes)]
        for shown in (x for x in studio.found[key] if x.conf > 0.04):
            same = [p for n, p, b in rows if n == shown.name and iou(b, shown.xyxy) > 0.95]
            assert any(abs(float(p) - shown.conf) < 0.02 for p in same), shown
            compared += 1
    assert compared > 5


def test_the_detector_itself_does_not_change(start, shots, checkpoints):
    studio = start(images=shots[:3])
    before = {k: v.clone() for k, v in studio.rows.model.state_dict().items()}
    label_all(studio, shots[:3])
    studio.learn()
    studio.assess()
    studio.build()
    after = studio.rows.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_objects_of_other_images_are_found(start, shots):
    studio = start(images=shots)
    name = max(studio_names(shots), key=lambda n: sum(n == x for _, boxes in shots for x, _ in boxes))
    labeled = [i for i, (_, boxes) in enumerate(shots) if name in {n for n, _ in boxes}]
    for i in labeled[:-1]:
        for n, box in shots[i][1]:
            studio.label(studio.keys[i], n, box, snap=False)
    studio.refresh()
    assert not any(studio.found.values())  # nothing was learned yet
    studio.learn()
    key, boxes = studio.keys[labeled[-1]], shots[labeled[-1]][1]
    at = {
        n: max((x.conf for x in studio.found[key] if x.name == name and iou(x.xyxy, b) > 0.5), default=0)
        for n, b in boxes
    }
    assert at[name] == max(at.values()) > 0


def studio_names(shots):
    return sorted({n for _, boxes in shots for n, _ in boxes})


def test_the_network_sees_an_image_once(start, shots, monkeypatch):
    studio = start(images=shots[:4])
    label_all(studio, shots[:2])
    studio.refresh()
    studio.learn()
    seen = []
    predict = studio.rows.predict
    monkeypatch.setattr(studio.rows, "predict", lambda img: seen.append(len(img)) or predict(img))
    studio.learn()
    studio.refresh()
    studio.set_conf(studio.learned.names[0], 0.9)
    assert not seen
    name, box = shots[2][1][0]
    studio.label(studio.keys[2], name, box, snap=False)
    studio.learn()
    assert seen == [1] * len(studio.views)  # the views of the image whose labels have changed


def test_a_rejected_box_is_gone_and_less_certain_everywhere(start, shots):
    studio = start(images=shots)
    label_all(studio, shots[:8])
    studio.learn()
    studio.refresh()
    key, wrong = max(
        ((k, x) for k, (_, boxes) in zip(studio.keys[8:], shots[8:]) for x in studio.found[k]), key=lambda y: y[1].conf
    )
    studio.set_conf(wrong.name, wrong.conf / 2)
    assert wrong in studio.shown(key)
    studio.reject(key, wrong)
    assert wrong not in studio.shown(key)  # at once
    studio.learn()
    same = [x.conf for x in studio.found[key] if x.name == wrong.name and iou(x.xyxy, wrong.xyxy) > 0.5]
    assert max(same, default=0) < wrong.conf * 0.8
    assert not any(iou(x.xyxy, wrong.xyxy) > 0.5 and x.name == wrong.name for x in studio.shown(key))


def test_an_image_without_objects_makes_false_alarms_less_certain(start, shots):
    studio = start(images=shots)
    label_all(studio, shots[:8])
    studio.learn()
    studio.refresh()
    key = max(studio.keys[8:], key=lambda k: max((x.conf for x in studio.found[k]), default=0))
    before = max(x.conf for x in studio.found[key])
    studio.set_empty(key, True)
    studio.learn()
    assert max((x.conf for x in studio.found[key]), default=0) < before


def test_without_labels_there_is_nothing(start, shots):
    studio = start(images=shots[:2])
    studio.learn()
    assert studio.learned is None and not studio.assess()
    with pytest.raises(ValueError, match="Draw a box"):
        studio.build()
    name, box = shots[0][1][0]
    number = studio.label(studio.keys[0], name, box).id
    studio.learn()
    assert studio.learned.names == [name]
    studio.unlabel(studio.keys[0], number)
    studio.learn()
    assert studio.learned is None and not any(studio.found.values())


def test_one_box_is_enough_to_begin(start, shots):
    studio = start(images=shots[:3])
    name, box = shots[0][1][0]
    studio.label(studio.keys[0], name, box, snap=False)
    studio.learn()
    studio.assess()
    assert studio.learned.shots == [1] and 0 < studio.threshold(name) <= CONF
    assert studio.figures[name].at(0.1) == (None, None) and studio.figures[name].likeness is None


def test_a_class_of_the_detector_is_not_learned_again(start, shots):
    studio = start(images=shots[:3])
    own = studio.own[0]
    name, box = shots[0][1][0]
    studio.label(studio.keys[0], name, box, snap=False)
    studio.label(studio.keys[0], own, (0.0, 0.0, 0.2, 0.2), snap=False)
    studio.learn()
    assert studio.learned.names == [name] and studio.project.names == [name, own]
    assert studio.build().names[0] == own


def test_a_tiny_object_does_not_stop_the_others(start, shots):
    studio = start(images=shots[:3])
    name, box = shots[0][1][0]
    studio.label(studio.keys[0], name, box, snap=False)
    studio.label(studio.keys[1], "dust", (0.5, 0.5, 0.5 + 2.2 / SIZE, 0.5 + 2.2 / SIZE), snap=False)
    studio.learn()
    studio.assess()
    assert name in studio.learned.names and set(studio.learned.names + studio.learned.lost) == {name, "dust"}


def test_cross_validation_gives_figures_and_a_threshold(start, shots):
    studio = start(images=shots)
    label_all(studio, shots)
    studio.learn()
    studio.assess()
    assert set(studio.figures) == set(studio.project.names)
    some = [f for f in studio.figures.values() if f.suggested is not None]
    assert some
    for f in some:
        precision, recall = f.at(f.suggested)
        assert 0 < precision <= 1 and 0 < recall <= 1
        assert f.at(0.0)[1] >= recall and f.at(1.1) == (None, 0.0)
        assert -1 <= f.likeness <= 1


def test_precision_and_recall_of_a_threshold():
    figures = Figures(0.5, None, torch.tensor([0.9, 0.8, 0.3, 0.2]), torch.tensor([True, False, True, False]), 4)
    assert figures.at(0.5) == (0.5, 0.25)
    assert figures.at(0.25) == (pytest.approx(2 / 3), 0.5)
    assert figures.at(0.95) == (None, 0.0)
    assert figures._replace(n_gt=0).at(0.5) == (None, None)


def test_a_wrong_label_is_suspect_and_comes_first(start, shots):
    studio = start(images=shots)
    by_name = {}
    for key, (_, boxes) in zip(studio.keys, shots):
        for name, box in boxes:
            by_name.setdefault(name, []).append((key, box))
    a, b = sorted(by_name, key=lambda n: -len(by_name[n]))[:2]
    for name in (a, b):
        for key, box in by_name[name][:-1]:
            studio.label(key, name, box, snap=False)
    key, box = by_name[b][-1]
    wrong = studio.label(key, a, box, snap=False)
    studio.learn()
    studio.assess()
    if wrong.id in studio.suspects:
        assert studio.order()[0] in {k for k in studio.keys if studio.usefulness(k) == 3}
    assert all(studio.usefulness(k) in {0, 3} for k in studio.keys if studio.project.images[k].boxes)


def test_the_least_certain_image_comes_first(start, shots):
    studio = start(images=shots[:4])
    label_all(studio, shots[:1])
    a, b, c = studio.keys[1:]
    box = (0.1, 0.1, 0.2, 0.2)
    studio.found = {a: [Found("x", 0.9, box, False)], b: [Found("x", 0.26, box, False)], c: []}
    assert studio.order() == [b, a, c, studio.keys[0]]
    studio.set_conf("x", 0.9)
    assert studio.order() == [a, b, c, studio.keys[0]]
    studio.reject(a, studio.found[a][0])
    assert studio.order()[0] == b


def test_uncertainty_is_largest_at_the_threshold():
    values = [uncertainty(c, 0.3) for c in (0.01, 0.2, 0.3, 0.5, 0.99)]
    assert values[2] == pytest.approx(1) and values == sorted(values[:3]) + sorted(values[3:], reverse=True)
    assert uncertainty(0.0, 0.0) == pytest.approx(1) and 0 <= uncertainty(1.0, 0.0) < 0.01


def test_a_box_snaps_to_a_proposal(start, shots):
    studio = start(images=shots[:1])
    (key,) = studio.keys
    studio.known[key] = [Found("star", 0.5, (0.2, 0.2, 0.6, 0.6), True)]
    assert studio.label(key, "a", (0.61, 0.59, 0.21, 0.18)).xyxy == (0.2, 0.2, 0.6, 0.6)  # drawn from the lower right
    with pytest.raises(ValueError, match="has a box already"):
        studio.label(key, "b", (0.21, 0.2, 0.6, 0.6))
    assert studio.label(key, "a", (0.7, 0.7, 0.9, 0.9)).xyxy == (0.7, 0.7, 0.9, 0.9)


def test_a_click_finds_what_is_proposed_there(start, shots):
    studio = start(images=shots[:1])
    (key,) = studio.keys
    large, small = Found("star", 0.9, (0.1, 0.1, 0.9, 0.9), True), Found("plus", 0.1, (0.4, 0.4, 0.6, 0.6), True)
    own = Found("new", 0.03, (0.2, 0.2, 0.7, 0.7), False)
    studio.known[key], studio.found[key] = [large, small], [own]
    assert studio.proposal_at(key, "new", 0.5, 0.5) == own
    assert studio.proposal_at(key, "other", 0.5, 0.5) == small
    assert studio.proposal_at(key, "other", 0.95, 0.5) is None
    studio.label(key, "other", small.xyxy)
    assert studio.proposal_at(key, "other", 0.5, 0.5) == own


@pytest.mark.parametrize("size", [(160, 160), (320, 160), (100, 301), (37, 1000)])
def test_boxes_are_in_the_coordinates_of_the_image(size):
    """Ultralytics' own way from the square to the image is the oracle."""
    from ultralytics.data.augment import LetterBox

    w, h = size
    image = np.zeros((h, w, 3), np.uint8)
    image[h // 4 : h // 2, w // 4 : w // 2] = 255
    ratio = SIZE / max(size)
    small = cv2.resize(image, (min(int(np.ceil(w * ratio)), SIZE), min(int(np.ceil(h * ratio)), SIZE)))
    square = LetterBox((SIZE, SIZE), scaleup=False)(image=small)
    y, x = (np.nonzero((square > 128).all(2).any(axis))[0][[0, -1]] for axis in (1, 0))
    box = torch.tensor([[x[0], y[0], x[1] + 1, y[1] + 1]]).float()
    expected = [w // 4 / w, h // 4 / h, w // 2 / w, h // 2 / h]
    error = (_in_image(box, size, SIZE)[0] - torch.tensor(expected)).abs() * torch.tensor(size).repeat(2) * ratio
    assert error.max() <= 1.01  # pixel of the square


def test_it_goes_on_where_it_was_closed(start, shots):
    first = start("stock", shots[:6])
    label_all(first, shots[:4])
    first.set_conf(first.project.names[0], 0.123)
    first.refresh()
    first.learn()
    first.close()
    second = start("stock")
    second.refresh()
    second.learn()
    assert second.threshold(second.project.names[0]) == 0.123
    for key in first.keys:
        assert [x.name for x in second.found[key]] == [x.name for x in first.found[key]]
        np.testing.assert_allclose([x.conf for x in second.found[key]], [x.conf for x in first.found[key]], atol=1e-3)


def test_images_beyond_the_memory_are_read_again(start, shots, monkeypatch):
    whole = start(images=shots[:5])
    label_all(whole, shots[:2])
    whole.refresh()
    whole.learn()
    monkeypatch.setattr(scenes, "MAX_KEPT", whole._scenes.kept[whole.keys[0]].size * 2)
    small = start(images=shots[:5], folder="small")
    label_all(small, shots[:2])
    small.refresh()
    assert len(small._scenes.kept) == 2
    small.learn()
    assert small.refresh(n=2) and not small.refresh(n=2)
    for key in whole.keys:
        np.testing.assert_allclose([x.conf for x in small.found[key]], [x.conf for x in whole.found[key]], atol=1e-3)


def test_new_statistics_do_not_outdate_what_was_learned(start, shots):
    """The third and fourth image change the statistics: the same objects are found as after learning from the start."""
    studio = start("stock", shots[:3])
    label_all(studio, shots[:2])
    studio.refresh()
    studio.learn()
    studio.keys.append(studio.add(shots[3][0].read_bytes(), "4.png"))
    studio.refresh()
    before = {k: [x.conf for x in studio.found[k]] for k in studio.keys}
    studio.learn()
    assert before == {k: [x.conf for x in studio.found[k]] for k in studio.keys} and any(before.values())


def test_a_class_of_one_uncertain_shot_is_shown(start, shots):
    studio = start(images=shots[:2])
    name, box = shots[0][1][0]
    studio.label(studio.keys[0], name, box, snap=False)
    studio.refresh()
    studio.found = {studio.keys[0]: [Found(name, 0.3, box, False)], studio.keys[1]: [Found(name, 0.2, box, False)]}
    studio._defaults = as_sure_as_of_shots(studio.found, studio.project.images.values())
    assert studio.threshold(name) == 0.15 and len(studio.shown(studio.keys[1])) == 1
    studio.figures = {name: Figures(0.5, None, torch.zeros(0), torch.zeros(0), 0)}
    assert studio.threshold(name) == 0.5  # a suggested one is better


def test_a_removed_image_leaves_nothing(start, shots):
    studio = start(images=shots[:3])
    label_all(studio, shots[:2])
    studio.refresh()
    studio.learn()
    studio.remove(studio.keys[0])
    studio.learn()
    assert studio.keys[0] not in {*studio.found, *studio.known, *studio._scenes.kept, *studio.order()}


def test_a_folder_and_a_video_are_read(start, shots, tmp_path):
    studio = start()
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "deep" / "a.png").write_bytes(shots[0][0].read_bytes())
    (tmp_path / "in" / "notes.txt").write_text("not an image")
    video = cv2.VideoWriter(str(tmp_path / "in" / "film.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 64))
    for i in range(30):
        video.write(np.full((64, 64, 3), 8 * i, np.uint8))
    video.release()
    keys = studio.add_source(tmp_path / "in", frames=3)
    assert [studio.project.images[k].name for k in keys] == [
        "a.png", "film.avi frame 0", "film.avi frame 14", "film.avi frame 29"
    ]  # fmt: skip
    middle = cv2.imread(str(studio.project.path(studio.project.images[keys[2]])))
    assert abs(middle.mean() - 8 * 14) < 4


def test_its_own_and_hidden_files_are_no_source(start, shots, tmp_path):
    studio = start(images=shots[:1])
    for folder in (".git", "in"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(shots[1][0].read_bytes())
    (tmp_path / "in" / ".b.png").write_bytes(shots[2][0].read_bytes())
    keys = studio.add_source(tmp_path)
    assert [studio.project.images[k].name for k in keys] == ["a.png"] and len(studio.project.images) == 2
    with pytest.raises(ValueError, match="no images"):
        studio.add_source(studio.project.folder)


def test_an_image_may_be_removed_while_the_network_sees(start, shots, monkeypatch):
    studio = start(images=shots[:4])
    label_all(studio, shots[:2])
    see, predict = studio._scenes.see, studio.yolo.predict
    monkeypatch.setattr(studio._scenes, "see", lambda keys: studio.remove(studio.keys[3]) or see(keys))
    with monkeypatch.context() as patch:
        patch.setattr(studio, "remove", lambda key, remove=studio.remove: key in studio.project.images and remove(key))
        studio.refresh()
        assert {*studio.found} == {*studio.known} == {*studio.keys[:3]}
        monkeypatch.undo()

    def remove_first(file, **kwargs):
        if studio.keys[2] in studio.project.images:
            studio.remove(studio.keys[2])
        return predict(file, **kwargs)

    studio.known.clear()
    monkeypatch.setattr(studio.yolo, "predict", remove_first)
    assert {*studio._predict(studio.yolo, studio.keys[:3], set())} == {*studio.keys[:2]}
    shots_of = studio._scenes.shots_of
    monkeypatch.setattr(
        studio._scenes,
        "shots_of",
        lambda image: (image.key == studio.keys[0] and studio.remove(image.key)) or shots_of(image),
    )
    studio.learn()
    assert studio.learned.names == sorted({n for n, _ in shots[1][1]}, key=studio.project.names.index)


def test_sources_without_images_are_errors(start, tmp_path):
    studio = start()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        studio.add_source(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images"):
        studio.add_source(tmp_path / "empty")
    (tmp_path / "empty" / "a.jpg").write_text("text")
    with pytest.raises(ValueError, match=r"a\.jpg is not an image"):
        studio.add_source(tmp_path / "empty")
    skipped = []
    assert not studio.add_source(tmp_path / "empty", skipped=skipped) and "a.jpg" in skipped[0]
    (tmp_path / "film.mp4").write_text("text")
    with pytest.raises(ValueError, match=r"film\.mp4 is not a video"):
        studio.add_source(tmp_path / "film.mp4")


@pytest.mark.parametrize(
    "text", ["#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "ffconcat version 1.0\nfile a.avi\n", ""]
)
def test_a_playlist_is_no_video(text, start, tmp_path, monkeypatch):
    studio, opened, capture = start(), [], cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", lambda file: opened.append(file) or capture(file))
    (tmp_path / "film.mp4").write_text(text)
    with pytest.raises(ValueError, match=r"film\.mp4 is not a video"):
        studio.add_video(tmp_path / "film.mp4", "film.mp4")
    assert opened == [""]


def test_a_model_without_rows_is_refused_before_a_project_is_made(tmp_path):
    model = YOLO("yolo11n-cls.yaml", verbose=False)
    model.save(tmp_path / "cls.pt")
    with pytest.raises(TypeError, match="yolo-fewshot studio needs a YOLO model"):
        Studio(tmp_path / "cls.pt", tmp_path / "project")
    assert not (tmp_path / "project").exists()


def test_the_trained_model_is_looked_at_and_kept(start, shots, tmp_path):
    studio = start(images=shots[:4])
    label_all(studio, shots[:4])
    studio.learn()
    with pytest.raises(ValueError, match="No model was trained"):
        studio.save(tmp_path / "x.pt", trained=True)
    studio.save(tmp_path / "new.pt")
    studio.adopt(tmp_path / "new.pt")
    studio.look()
    names = set(studio.project.names)
    assert {x.name for k in studio.keys for x in studio.trained[k] if not x.known} <= names
    assert any(not x.known for k in studio.keys for x in studio.trained[k])
    shown = [x for k in studio.keys for x in studio.shown(k, trained=True, judged=True)]
    assert {x.name for x in shown if not x.known} and min(x.conf for x in shown) >= 2 * CONF_MIN
    assert names <= set(FewShotYOLO(studio.save(tmp_path / "out.pt", trained=True)).names.values())
    before, added = dict(studio.trained), studio.add(shots[4][0].read_bytes(), "later.png")
    studio.project.rename(studio.project.names[0], "another name")
    studio.look()
    assert studio.trained[added] and {k: studio.trained[k] for k in before} == before
    assert names >= {x.name for x in studio.trained[added] if not x.known} and studio.trained.keys() > before.keys()
    studio.remove(added)
    studio.trained.clear()
    studio.look()  # after the class was renamed
    assert any(x.name in names and not x.known for k in studio.keys for x in studio.trained[k])


def test_a_renamed_class_is_renamed_in_the_trained_model(start, shots, tmp_path):
    studio = start(images=shots[:4])
    label_all(studio, shots[:4])
    studio.learn()
    studio.save(tmp_path / "new.pt")
    studio.adopt(tmp_path / "new.pt")
    first = studio.project.names[0]
    studio.rename(first, "kite  surfer")
    model = FewShotYOLO(studio.save(tmp_path / "out.pt", trained=True)).model
    assert {"kite surfer"} == set(model.names.values()) & {first, "kite surfer"} and "kite surfer" in model.enrolled
    assert studio.look(3) is True and len(studio.trained) == 3
    assert studio.look() is False and len(studio.trained) == 4
    assert first not in {x.name for found in studio.trained.values() for x in found}


def test_a_box_around_a_labeled_object_does_not_snap_to_it(start, shots):
    studio = start(images=shots[:1])
    (key,) = studio.keys
    studio.found[key] = [Found("scooter", 0.9, (0.1, 0.1, 0.5, 0.5), False)]
    assert studio.label(key, "scooter", (0.1, 0.1, 0.5, 0.49)).xyxy == (0.1, 0.1, 0.5, 0.5)
    wide = (0.1, 0.05, 0.52, 0.55)
    assert studio.label(key, "rider", wide).xyxy == wide


def test_a_file_that_cannot_be_read_is_skipped(start, shots, tmp_path, monkeypatch):
    studio, skipped, source = start(), [], tmp_path / "photos"
    source.mkdir()
    for file, _ in shots[:2]:
        shutil.copy(file, source)
    bad = source / "bad.png"
    bad.touch()
    read = Path.read_bytes

    def refuse(self):
        if self == bad:
            raise PermissionError(13, "Permission denied")
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert len(studio.add_source(source, skipped=skipped)) == 2
    assert skipped == ["bad.png cannot be read: Permission denied."]


def test_export_to_onnx(start, shots, tmp_path):
    studio = start(images=shots[:2])
    label_all(studio, shots[:2])
    studio.learn()
    file = studio.export(tmp_path / "site.onnx")
    assert set(
        YOLO(file, task="detect").predict(str(shots[0][0]), imgsz=SIZE, verbose=False, save=False)[0].names.values()
    ) >= set(studio.project.names)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["project", "site.onnx"]


@pytest.mark.parametrize("cfg", ["yolo26n.yaml", "yolo11n-seg.yaml", "yolo11n-obb.yaml"])
def test_models_of_other_heads_and_tasks(cfg, shots, tmp_path):
    """What is found is what the saved model finds, with two branches, masks or rotated boxes."""
    network = stock_of(cfg)
    model = FewShotYOLO(cfg, verbose=False)
    model.model = network
    model.save(tmp_path / "stock.pt")
    studio = Studio(tmp_path / "stock.pt", tmp_path / "project", imgsz=SIZE, device="cpu")
    try:
        studio.keys = [studio.add(f.read_bytes(), f.name) for f, _ in shots[:4]]
        label_all(studio, shots[:4])
        studio.refresh()
        studio.learn()
        studio.assess()
        built = studio.build()
        names = {n for _, boxes in shots[:4] for n, _ in boxes}
        assert studio.learned.names and {*studio.learned.names, *studio.learned.lost} == names
        assert built.model.model[-1].nc == len(studio.own) + len(studio.learned.names)
        result = built.predict(
            str(shots[0][0]), imgsz=SIZE, conf=0.02, device="cpu", verbose=False, save=False, nms=True
        )[0]
        boxes = result.boxes if result.obb is None else result.obb
        rows = [(result.names[int(c)], p) for c, p in zip(boxes.cls.tolist(), boxes.conf.tolist())]
        for name in studio.learned.names:
            saved = max((p for n, p in rows if n == name), default=0)
            shown = max((x.conf for x in studio.found[studio.keys[0]] if x.name == name), default=0)
            assert abs(shown - saved) < 0.03
    finally:
        studio.close()
