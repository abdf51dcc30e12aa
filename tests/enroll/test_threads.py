"""Threads that share one model."""

import copy
import pickle
import threading

import pytest
import torch
from test_features import draw_shots, model_of

from yolo_fewshot import FewShotYOLO

pytestmark = pytest.mark.slow

SIZE, THREADS = 64, 4
CFGS = ["yolo11n-fewshot.yaml", "yolo26n-fewshot.yaml"]


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    return draw_shots(tmp_path_factory.mktemp("shots"), SIZE)


@pytest.fixture(scope="module")
def images(shots):
    return sorted((shots.parent / "images").rglob("*.png"))


@pytest.fixture(scope="module", params=CFGS)
def checkpoint(request, tmp_path_factory):
    file = tmp_path_factory.mktemp("model") / "best.pt"
    torch.save({"model": model_of(request.param), "train_args": {"imgsz": SIZE}}, file)
    return file


def together(*jobs):
    """Run jobs in threads that start at once, and return what they return; an error of one is raised."""
    barrier, out = threading.Barrier(len(jobs)), [None] * len(jobs)

    def run(i, job):
        barrier.wait()
        try:
            out[i] = job()
        except Exception as e:
            out[i] = e

    threads = [threading.Thread(target=run, args=x) for x in enumerate(jobs)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for x in out:
        if isinstance(x, Exception):
            raise x
    return out


def boxes(results):
    return torch.cat([r.boxes.data for r in results])


def predict(model, images, **kwargs):
    return boxes(model.predict(images, imgsz=SIZE, conf=0.1, verbose=False, **kwargs))


def test_threads_with_the_same_support_set_predict_as_a_single_thread(checkpoint, shots, images):
    expected = predict(FewShotYOLO(checkpoint), images, support=shots)
    assert len(expected) > 3
    model = FewShotYOLO(checkpoint)
    for found in together(*[lambda: predict(model, images, support=shots)] * THREADS):
        assert torch.equal(found, expected)
    assert list(model.names.values())[2:] == ["square", "disc"] and not model.model.training


def test_threads_with_different_support_sets_predict_by_their_own(checkpoint, shots, images, tmp_path):
    text = shots.read_text()
    assert "square" in text
    sets = [shots]
    for name in ("b", "c"):
        sets.append(tmp_path / f"{name}.yaml")
        sets[-1].write_text(
            f"path: {shots.parent}\n" + text.replace("square", f"square {name}").replace("disc", f"disc {name}")
        )
    model = FewShotYOLO(checkpoint)

    def job(support):
        found = model.predict(images, support=support, imgsz=SIZE, conf=0.1, verbose=False)
        return {n.partition(" ")[2] for n in found[0].enrolled}

    found = together(*[lambda s=s: job(s) for s in sets])
    assert all(mine in x for mine, x in zip(("", "b", "c"), found))  # those of others may be known, too
    assert sorted(model.model.enrolled) == sorted(f"{x}{n}" for x in ("square", "disc") for n in ("", " b", " c"))
    assert model.model.model[-1].nc == len(model.names) == 8


def test_calls_that_change_or_copy_a_model_wait_for_each_other(checkpoint, shots, images, tmp_path, monkeypatch):
    monkeypatch.setattr("ultralytics.engine.model.Model.export", lambda self, **kwargs: type(self.model).__name__)
    model = FewShotYOLO(checkpoint)

    def change():
        for _ in range(2):
            model.enroll(shots, method="mean")
            model.forget("square")

    def save():
        for i in range(3):
            model.save(tmp_path / f"{i}.pt")
        return [FewShotYOLO(tmp_path / f"{i}.pt") for i in range(3)]

    jobs = [
        change,
        save,
        lambda: [model.export(format="onnx") for _ in range(3)],
        lambda: [model.predict(images[:1], imgsz=SIZE, verbose=False)[0].names for _ in range(3)],
    ]
    _, saved, exported, names = together(*jobs)
    assert exported == ["DetectionModel"] * 3 and type(model.model).__name__ == "FewShotDetectionModel"
    for x in saved:
        assert x.model.model[-1].nc == len(x.names) == len(x.model.enrolled) + 2
    assert all(set(x.values()) <= {"cat", "dog", "square", "disc"} for x in names)
    assert list(model.names.values()) == ["cat", "dog", "disc"]


def test_an_unfinished_stream_does_not_block_other_threads(checkpoint, shots, images):
    model = FewShotYOLO(checkpoint)
    stream = model.predict(images, support=shots, imgsz=SIZE, conf=0.1, verbose=False, stream=True)
    first = [next(stream)]
    together(lambda: model.enroll(shots, method="mean"))
    expected = predict(FewShotYOLO(checkpoint), images, support=shots)
    assert torch.equal(boxes([*first, *stream]), expected)  # by the classes as they were when it began


def test_copies_and_pickles_of_a_model_enroll(checkpoint, shots):
    model = FewShotYOLO(checkpoint)
    model.enroll(shots, method="mean")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.enroll(shots, method="fit") == {"square": 4, "disc": 2}
        assert {x["method"] for x in other.model.enrolled.values()} == {"fit"}
    assert {x["method"] for x in model.model.enrolled.values()} == {"mean"}
