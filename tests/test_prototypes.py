import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ultralytics.data.utils import check_det_dataset

from yolo_fewshot import FewShotYOLO
from yolo_fewshot.assign import BoxAssignment
from yolo_fewshot.model import FewShotDetectionModel
from yolo_fewshot.prototypes import class_means, embed_objects, enroll, pool_objects


def test_pooling_is_the_weighted_mean_of_an_objects_anchors():
    torch.manual_seed(0)
    embeds = torch.randn(3, 20, 8)
    fg = (torch.tensor([0, 0, 0, 2, 2]), torch.tensor([1, 5, 7, 0, 19]))
    gt_idx, weight = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0.2, 0.6, 0.9, 0.5, 0.1])
    pooled, valid = pool_objects(embeds, fg, gt_idx, weight, n_max=2)
    assert valid.tolist() == [True, True, False, False, False, True]
    for row, parts in {0: [(0, 1, 0.2), (0, 5, 0.6)], 1: [(0, 7, 0.9)], 5: [(2, 0, 0.5), (2, 19, 0.1)]}.items():
        expected = sum(w * embeds[b, a] for b, a, w in parts)
        torch.testing.assert_close(pooled[row], expected / expected.norm())
    assert not pooled[[2, 3, 4]].any()


def test_pooling_survives_the_weights_of_an_untrained_model():
    embeds = torch.randn(1, 5, 8, requires_grad=True)
    fg = (torch.zeros(2, dtype=torch.long), torch.tensor([1, 3]))
    pooled, valid = pool_objects(embeds, fg, torch.zeros(2, dtype=torch.long), torch.full((2,), 1e-15), 1)
    pooled[0, 0].backward()
    assert valid.all() and pooled[0].norm().item() == pytest.approx(1) and embeds.grad.norm() < 10


def test_class_means_are_unit_means_and_negative_labels_are_left_out():
    torch.manual_seed(0)
    objects, labels = F.normalize(torch.randn(6, 5), dim=1), torch.tensor([2, 0, 2, -1, 0, 2])
    prototypes, counts = class_means(objects, labels, 4)
    assert counts.tolist() == [2, 0, 3, 0]
    for c in (0, 2):
        mean = objects[labels == c].mean(0)
        torch.testing.assert_close(prototypes[c], mean / mean.norm())
    assert not prototypes[[1, 3]].any()


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    """Four pictures: a square (class 1) and a disc (class 3) in two of them, one empty, names of four classes."""
    root = tmp_path_factory.mktemp("shots")
    (root / "images").mkdir()
    (root / "labels").mkdir()
    for i in range(4):
        picture = np.full((96, 96, 3), 200, dtype=np.uint8)
        rows = []
        if i != 3:
            cv2.rectangle(picture, (10 + i, 10), (40 + i, 40), (0, 0, 255), -1)
            rows.append(f"1 {(25 + i) / 96} {25 / 96} {30 / 96} {30 / 96}")
        if i in {0, 1}:
            cv2.circle(picture, (70, 65), 18, (255, 0, 0), -1)
            rows.append(f"3 {70 / 96} {65 / 96} {36 / 96} {36 / 96}")
        cv2.imwrite(str(root / f"images/{i}.png"), picture)
        (root / f"labels/{i}.txt").write_text("\n".join(rows))
    names = {0: "cat", 1: "square", 2: "dog", 3: "disc"}
    lines = "\n".join(f"  {i}: {n}" for i, n in names.items())
    (root / "shots.yaml").write_text(f"train: images\nval: images\nnames:\n{lines}\n")
    return root / "shots.yaml"


def model_of(cfg="yolo11n-fewshot.yaml"):
    torch.manual_seed(0)
    model = FewShotDetectionModel(cfg, nc=2, verbose=False).eval()
    model.names = {0: "cat", 1: "dog"}
    model.args = {}  # as loading a checkpoint sets it
    return model


def load_batch():
    picture = np.full((2, 96, 96, 3), 200, dtype=np.uint8)
    picture[0, 10:40, 10:40] = 0
    return {
        "img": torch.from_numpy(picture).permute(0, 3, 1, 2).float() / 255,
        "cls": torch.tensor([[1.0], [3.0], [1.0]]),
        "bboxes": torch.tensor([[0.26, 0.26, 0.31, 0.31], [0.7, 0.7, 0.4, 0.4], [0.5, 0.5, 0.6, 0.5]]),
        "batch_idx": torch.tensor([0.0, 0.0, 1.0]),
    }


def test_assignment_gives_every_object_anchors_inside_its_box():
    model, batch = model_of(), load_batch()
    model.model[-1].training = True
    with torch.no_grad():
        preds = model(batch["img"])
    fg, gt_idx, weight, n_max = BoxAssignment(model)(preds, batch)
    assert n_max == 2 and len(fg[0]) == len(fg[1]) == len(gt_idx) == len(weight)
    assert {(int(b), int(g)) for b, g in zip(fg[0], gt_idx)} == {(0, 0), (0, 1), (1, 0)}
    centres = torch.cat(
        [
            torch.stack(torch.meshgrid(torch.arange(n) + 0.5, torch.arange(n) + 0.5, indexing="xy"), -1).view(-1, 2) * s
            for n, s in ((12, 8), (6, 16), (3, 32))
        ]
    )
    box = {(0, 0): 0, (0, 1): 1, (1, 0): 2}
    for b, a, g in zip(fg[0], fg[1], gt_idx):
        x, y, w, h = batch["bboxes"][box[int(b), int(g)]] * 96
        assert abs(centres[a][0] - x) <= max(w, 16) / 2 and abs(centres[a][1] - y) <= max(h, 16) / 2


def test_embedding_objects_leaves_the_model_as_it_was():
    model, batch = model_of(), load_batch()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    embeds, valid = embed_objects(model, batch)
    assert not model.training and not any(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert embeds[0].shape == (3, 128) and valid.all()
    torch.testing.assert_close(embeds[0].norm(dim=1), torch.ones(3))


@pytest.mark.parametrize("cfg", ["yolo11n-fewshot.yaml", "yolov8n-fewshot.yaml", "yolo26n-fewshot.yaml"])
def test_enrolment_appends_new_classes_and_changes_nothing_else(shots, cfg):
    model = model_of(cfg)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert enroll(model, check_det_dataset(shots), imgsz=96) == {"square": 3, "disc": 2}
    assert model.names == {0: "cat", 1: "dog", 2: "square", 3: "disc"}
    assert model.nc == model.model[-1].nc == model.yaml["nc"] == 4
    for k, v in model.state_dict().items():
        grown = k.endswith(("prototypes.weight", "prototypes.frozen"))
        assert torch.equal(v[:2] if grown else v, before[k]), k


def test_the_prototype_is_the_mean_over_the_shots(shots):
    """Against one forward pass per picture, with the objects' embeddings averaged by hand."""
    model = model_of()
    square = []
    for i in range(3):
        picture = cv2.imread(str(shots.parent / f"images/{i}.png"))[..., ::-1].copy()
        rows = np.loadtxt(shots.parent / f"labels/{i}.txt", ndmin=2)
        batch = {
            "img": torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255,
            "cls": torch.tensor(rows[:, :1], dtype=torch.float32),
            "bboxes": torch.tensor(rows[:, 1:], dtype=torch.float32),
            "batch_idx": torch.zeros(len(rows)),
        }
        square.append(embed_objects(model, batch)[0][0][rows[:, 0] == 1])
    mean = torch.cat(square).mean(0)
    enroll(model, check_det_dataset(shots), imgsz=96, batch=2)
    torch.testing.assert_close(model.model[-1].prototypes.weight[2, :, 0], mean / mean.norm(), rtol=1e-4, atol=1e-5)


def test_enrolling_again_replaces_the_class(shots):
    model = model_of()
    enroll(model, check_det_dataset(shots), imgsz=96)
    first = model.model[-1].prototypes.weight.detach().clone()
    model.model[-1].prototypes.weight.data[2] += 1
    enroll(model, check_det_dataset(shots), imgsz=96)
    assert model.model[-1].nc == 4
    torch.testing.assert_close(model.model[-1].prototypes.weight.detach(), first)


def test_a_new_class_without_a_box_is_an_error_and_the_model_stays(shots, tmp_path):
    text = shots.read_text().replace("train: images", f"train: {shots.parent}/images")
    text = text.replace("val: images", f"val: {shots.parent}/images") + "  4: bird\n"
    (tmp_path / "more.yaml").write_text(text)
    model = model_of()
    with pytest.raises(ValueError, match="No usable box for bird"):
        enroll(model, check_det_dataset(tmp_path / "more.yaml"), imgsz=96)
    assert model.names == {0: "cat", 1: "dog"} and model.model[-1].nc == 2


def test_python_interface_enrols_and_predicts_with_the_new_classes(shots, tmp_path):
    model = FewShotYOLO("fewshot.yaml")
    model.model.names = {0: "cat", 1: "dog", **{i: f"base{i}" for i in range(2, 80)}}
    assert model.enroll(shots, imgsz=96) == {"square": 3, "disc": 2}
    result = model.predict(str(shots.parent / "images/0.png"), imgsz=96, verbose=False)[0]
    assert len(result.names) == 82 and result.names[80] == "square"
    model.save(tmp_path / "enrolled.pt")
    assert FewShotYOLO(tmp_path / "enrolled.pt").names[81] == "disc"


def test_stock_models_are_told_to_upgrade(shots):
    with pytest.raises(TypeError, match=r"cfg=stage1\.yaml"):
        FewShotYOLO("yolo11n.yaml").enroll(shots)
