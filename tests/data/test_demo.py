"""Tests of the built-in demo data set."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from yolo_fewshot.data import demo
from yolo_fewshot.data.demo import BASE, GLYPHS, NOVEL, SIZE, build, draw_glyph

CFG = Path(__file__).resolve().parents[2] / "cfg"
SPLITS = {"train": (600, 90), "val": (120, 18), "novel_query": (80, 36), "novel_support": (24, 10)}


def files(root: Path) -> dict[str, bytes]:
    """Read every file below a folder."""
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def read_labels(root: Path, split: str) -> dict[str, np.ndarray]:
    """Read the labels of a split by image name."""
    return {p.stem: np.loadtxt(p, ndmin=2) for p in sorted((root / "labels" / split).glob("*.txt"))}


def to_pixels(rows: np.ndarray) -> np.ndarray:
    """Turn label rows into whole-pixel x1, y1, x2, y2."""
    center, half = rows[:, 1:3] * SIZE, rows[:, 3:5] * SIZE / 2
    exact = np.concatenate((center - half, center + half), 1)
    assert np.abs(exact - np.rint(exact)).max() < 0.01
    return np.rint(exact).astype(int)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the data set once."""
    return build(tmp_path_factory.mktemp("demo") / "data")


def test_other_seed_other_images(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another seed draws other images, the same seed the same ones, and no image occurs twice."""
    drawn: list[np.ndarray] = []

    def keep(path: str, image: np.ndarray, *args: object) -> bool:
        drawn.append(image)
        return len(drawn) % 3 > 0

    monkeypatch.setattr(cv2, "imwrite", keep)
    for seed in (0, 1, 0):
        with pytest.raises(OSError, match="cannot write"):
            build(tmp_path / "data", seed=seed)
    assert np.array_equal(drawn[:3], drawn[6:]) and not np.array_equal(drawn[:3], drawn[3:6])
    assert len({f.read_bytes() for f in root.glob("images/*/*.jpg")}) == sum(n for n, _ in SPLITS.values())


@pytest.mark.parametrize("split", SPLITS)
def test_counts(root: Path, split: str) -> None:
    """Every class of a split occurs equally often, and no class of the other kind occurs."""
    images, each = SPLITS[split]
    labels = read_labels(root, split)
    assert len(labels) == images
    assert {p.stem for p in (root / "images" / split).iterdir()} == set(labels)
    assert {len(v) for v in labels.values()} <= {2, 3, 4}
    ids, counts = np.unique(np.concatenate(list(labels.values()))[:, 0].astype(int), return_counts=True)
    assert ids.tolist() == (list(range(24, 32)) if "novel" in split else list(range(24)))
    assert set(counts.tolist()) == {each}


@pytest.mark.parametrize("split", SPLITS)
def test_boxes(root: Path, split: str) -> None:
    """Boxes lie inside the image, keep apart, and end where the ink ends."""
    for name, rows in read_labels(root, split).items():
        image = cv2.imread(str(root / "images" / split / f"{name}.jpg")).astype(float)
        assert image.shape == (SIZE, SIZE, 3)
        boxes = to_pixels(rows)
        assert boxes.min() >= 1 and boxes.max() <= SIZE - 1
        sides = boxes[:, 2:] - boxes[:, :2]
        assert sides.max(1).min() >= 33 and sides.max() <= 65
        for i, a in enumerate(boxes):
            for b in boxes[i + 1 :]:
                assert (np.maximum(a[:2], b[:2]) >= np.minimum(a[2:], b[2:]) + 3).any()
        outside = np.ones((SIZE, SIZE), bool)
        for x1, y1, x2, y2 in boxes:
            outside[max(y1 - 2, 0) : y2 + 2, max(x1 - 2, 0) : x2 + 2] = False
        # The background is a plane per channel, so a least-squares fit away from the boxes recovers it.
        plane = np.stack((*np.indices((SIZE, SIZE)), np.ones((SIZE, SIZE))), -1)
        fit = np.linalg.lstsq(plane[outside], image[outside], rcond=None)[0]
        # Brightness averages the noise of three channels; every ink is at least 50 apart in it.
        off = cv2.blur(np.abs((image - plane @ fit).mean(2)), (2, 2))
        assert off[outside].max() < 25
        for x1, y1, x2, y2 in boxes:
            ink = off[y1:y2, x1:x2] > 25
            edges = ink[:3].any(), ink[-3:].any(), ink[:, :3].any(), ink[:, -3:].any()
            assert all(edges), (name, edges)


def test_five_shot_list(root: Path) -> None:
    """The list names images with exactly five objects of every novel class, part of the ten."""
    lines = (root / "novel_5shot.txt").read_text().splitlines()
    assert len(set(lines)) == len(lines) and all(line.startswith("./images/novel_support/") for line in lines)
    labels = read_labels(root, "novel_support")
    ids = np.concatenate([labels[Path(line).stem] for line in lines])[:, 0].astype(int)
    assert all((root / line).is_file() for line in lines)
    assert np.bincount(ids).tolist() == [0] * len(BASE) + [5] * len(NOVEL)


def test_glyphs_differ() -> None:
    """No two upright glyphs, nor one and the mirror image of another, look alike."""
    assert set(GLYPHS) == {*BASE, *NOVEL} and (len(BASE), len(NOVEL)) == (24, 8)

    def placed(glyph: np.ndarray) -> np.ndarray:
        canvas = np.zeros((66, 66))
        y, x = (66 - glyph.shape[0]) // 2, (66 - glyph.shape[1]) // 2
        canvas[y : y + glyph.shape[0], x : x + glyph.shape[1]] = glyph > 0.5
        return canvas

    drawn = {n: draw_glyph(n, 64, np.random.default_rng(0), jitter=0) for n in BASE + NOVEL}
    for a in drawn:
        for b in set(drawn) - {a}:
            for other in (drawn[b], drawn[b][:, ::-1]):
                one, two = placed(drawn[a]), placed(other)
                assert np.minimum(one, two).sum() / np.maximum(one, two).sum() < 0.8, (a, b)


def test_interrupted_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build that fails or is stopped midway leaves no folder; nor does an image that cannot be written."""
    real, calls = cv2.imwrite, []

    def stop(*args: object) -> bool:
        calls.append(args)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(cv2, "imwrite", stop)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "data")
    assert len(calls) == 10 and not list(tmp_path.iterdir())
    monkeypatch.setattr(cv2, "imwrite", lambda *args: False)
    with pytest.raises(OSError, match="cannot write"):
        build(tmp_path / "data")
    assert not list(tmp_path.iterdir())


def test_existing_folder_is_kept(tmp_path: Path) -> None:
    """A folder that holds something is never replaced."""
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="not empty"):
        build(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(("name", "names"), [("fewshot-demo", BASE), ("fewshot-demo-novel", BASE + NOVEL)])
def test_yaml_names(name: str, names: tuple[str, ...]) -> None:
    """The data YAMLs carry the class names in order."""
    data = yaml.safe_load((CFG / f"{name}.yaml").read_text())
    assert data["names"] == dict(enumerate(names)) and data["path"] == "fewshot-demo"


def test_a_build_keeps_the_data_that_another_process_wrote_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When another process finishes first, its complete data set stays and counts as built."""

    def other(new: Path, split: str, *args: object) -> None:
        new.mkdir(exist_ok=True)
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / "novel_5shot.txt").write_text("theirs")

    monkeypatch.setattr(demo, "_write_split", other)
    build(tmp_path / "data")
    assert files(tmp_path) == {"data/novel_5shot.txt": b"theirs"}


@pytest.mark.slow
def test_ultralytics_builds_it(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ultralytics draws the missing data from the YAML, byte for byte as before, and reads the whole 5-shot list."""
    from ultralytics.data import YOLODataset, utils

    np.random.seed(123)  # global random state must not matter
    monkeypatch.setattr(utils, "DATASETS_DIR", tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    data = utils.check_det_dataset(str(CFG / "fewshot-demo.yaml"))
    assert data["nc"] == 24 and Path(data["path"]) == tmp_path / "fewshot-demo"
    assert files(tmp_path / "fewshot-demo") == files(root)
    novel = utils.check_det_dataset(str(CFG / "fewshot-demo-novel.yaml"), autodownload=False)
    labels = YOLODataset(img_path=novel["train"], data=novel, imgsz=SIZE, augment=False, task="detect").labels
    assert len(labels) == 12 and sum(len(x["cls"]) for x in labels) == 5 * len(NOVEL)
