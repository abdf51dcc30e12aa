import copy
import csv
import pickle

import numpy as np
import pytest
from ultralytics.utils.metrics import DetMetrics

from yolo_fewshot.evaluate.metrics import HARMONIC_MEAN, FewShotMetrics, harmonic_mean

NAMES = dict(enumerate(["cat", "dog", "owl", "yak", "ape", "emu"]))
BASE, NOVEL = {0, 1, 4, 5}, {2, 3}  # there is no image of an emu


def images(classes=frozenset(NAMES), recall=1.0):
    """Statistics of 12 images of some classes: targets, predictions of any class, and what matched."""
    rng = np.random.default_rng(0)
    stats = []
    for i in range(12):
        target = rng.choice([0, 0, 1, 2, 3, 4], size=i % 5)
        predicted = np.r_[target, rng.integers(0, 6, 2)]
        tp = np.arange(10) < rng.integers(2, 11, len(predicted))[:, None]
        tp &= (rng.random(len(predicted)) < recall)[:, None]
        tp[len(target) :] = False
        conf = rng.random(len(predicted))
        t, p = np.isin(target, list(classes)), np.isin(predicted, list(classes))
        stats.append(
            {
                "tp": tp[p],
                "conf": conf[p],
                "pred_cls": predicted[p].astype(float),
                "target_cls": target[t].astype(float),
                "target_img": np.unique(target[t].astype(float)),
                "im_name": f"{i}.jpg",
            }
        )
    return stats


def processed(metrics, stats):
    for stat in stats:
        metrics.update_stats(stat)
    metrics.process()
    metrics.clear_stats()
    return metrics


@pytest.fixture
def metrics():
    return processed(FewShotMetrics(NAMES, NOVEL), images())


def test_ap_of_a_group_is_that_of_a_data_set_of_the_group_alone(metrics):
    aps = {}
    for name, classes in (("base", BASE), ("novel", NOVEL)):
        stock = processed(DetMetrics(NAMES), images(classes))
        aps[name] = stock.box.map50, stock.box.map
        assert 0.1 < stock.box.map < stock.box.map50 < 0.95  # the statistics are no trivial ones
        assert (metrics.groups[name]["mAP50"], metrics.groups[name]["mAP50-95"]) == pytest.approx(aps[name])
    assert aps["base"] != pytest.approx(aps["novel"], abs=0.01)
    expected = [2 / (1 / b + 1 / n) for b, n in zip(aps["base"], aps["novel"])]
    assert list(metrics.groups[HARMONIC_MEAN]) == ["mAP50", "mAP50-95"]
    assert list(metrics.groups[HARMONIC_MEAN].values()) == pytest.approx(expected)
    results = metrics.results_dict
    assert [results[f"metrics/{g}_mAP50(B)"] for g in ("base", "novel", "HM")] == pytest.approx(
        [aps["base"][0], aps["novel"][0], expected[0]]
    )
    assert [results[f"metrics/{g}_mAP50-95(B)"] for g in ("base", "novel", "HM")] == pytest.approx(
        [aps["base"][1], aps["novel"][1], expected[1]]
    )


def test_counts_precision_and_recall(metrics):
    stock = processed(DetMetrics(NAMES), images())
    assert stock.ap_class_index.tolist() == [0, 1, 2, 3, 4]
    for name, rows, classes in (("base", (0, 1, 4), BASE), ("novel", (2, 3), NOVEL)):
        group = metrics.groups[name]
        shown = [set(s["target_cls"]) & classes for s in images()]
        assert group["classes"] == len(rows)  # without the emu
        assert group["images"] == sum(map(bool, shown)) < sum(map(len, shown))  # images of two classes count once
        assert group["instances"] == sum(c in classes for s in images() for c in s["target_cls"])
        expected = [sum(stock.class_result(i)[j] for i in rows) / len(rows) for j in (0, 1)]
        assert [group["P"], group["R"]] == pytest.approx(expected)


def test_what_ultralytics_reports_stays(metrics):
    stock = processed(DetMetrics(NAMES), images())
    assert metrics.keys == stock.keys and metrics.summary() == stock.summary() and metrics.fitness == stock.fitness
    assert metrics.results_dict.items() > stock.results_dict.items()
    assert all(type(x) is float for x in metrics.results_dict.values())
    undivided = processed(FewShotMetrics(NAMES), images())
    assert list(undivided.results_dict.items()) == list(stock.results_dict.items()) and undivided.groups == {}


def test_without_novel_classes_any_more_there_are_no_groups(metrics):
    metrics.novel = set()
    processed(metrics, images())
    assert metrics.groups == {} and "metrics/HM_mAP50(B)" not in metrics.results_dict


def test_a_group_without_ap_makes_the_harmonic_mean_zero():
    stats = images(BASE)
    for miss in images(NOVEL, recall=0):
        stats.append({**miss, "im_name": f"miss {miss['im_name']}"})
    metrics = processed(FewShotMetrics(NAMES, NOVEL), stats)
    assert metrics.groups["base"]["mAP50"] > 0.1 and metrics.groups["novel"]["mAP50"] == 0
    assert metrics.groups[HARMONIC_MEAN] == {"mAP50": 0, "mAP50-95": 0}
    assert metrics.results_dict["metrics/HM_mAP50-95(B)"] == 0


@pytest.mark.parametrize(("shown", "present", "absent"), [(BASE, "base", "novel"), (NOVEL, "novel", "base")])
def test_a_group_without_labels_has_no_results(shown, present, absent, tmp_path):
    metrics = processed(FewShotMetrics(NAMES, NOVEL), images(shown))
    assert metrics.groups[absent] == {"classes": 0, "images": 0, "instances": 0}
    assert list(metrics.groups) == ["base", "novel"]
    new = set(metrics.results_dict) - set(DetMetrics(NAMES).results_dict)
    assert new == {f"metrics/{present}_mAP50(B)", f"metrics/{present}_mAP50-95(B)"}
    metrics.save_groups(tmp_path / "x.csv")
    assert f"\n{absent},0,0,0,,,,\n" in (tmp_path / "x.csv").read_text()


def test_saved_groups(metrics, tmp_path):
    def check(columns):
        metrics.save_groups(tmp_path / "x.csv")
        with open(tmp_path / "x.csv", newline="") as f:
            rows = {row.pop("group"): row for row in csv.DictReader(f)}
        assert list(rows) == ["base", "novel", "harmonic mean"]
        for name, row in rows.items():
            assert list(row) == columns
            assert {k: float(v) for k, v in row.items() if v} == pytest.approx(metrics.groups[name], abs=1e-6)

    columns = ["classes", "images", "instances", "P", "R", "mAP50", "mAP50-95"]
    check(columns)
    metrics.add_coco("base", 0.6, 0.4)
    assert "COCO AP50" not in metrics.groups[HARMONIC_MEAN]
    metrics.add_coco("novel", 0.3, 0.0)
    check([*columns, "COCO AP50", "COCO AP50-95"])
    assert metrics.groups[HARMONIC_MEAN]["COCO AP50"] == pytest.approx(0.4)
    results = metrics.results_dict
    assert [results[f"metrics/{g}_AP50(COCO)"] for g in ("base", "novel", "HM")] == pytest.approx([0.6, 0.3, 0.4])
    assert [results[f"metrics/{g}_AP50-95(COCO)"] for g in ("base", "novel", "HM")] == pytest.approx([0.4, 0, 0])


def test_large_counts_are_saved_in_full(metrics, tmp_path):
    metrics.groups["base"]["instances"] = 12345678
    metrics.save_groups(tmp_path / "x.csv")
    assert ",12345678," in (tmp_path / "x.csv").read_text()


def test_pickle_copy_and_text(metrics):
    for twin in (pickle.loads(pickle.dumps(metrics)), copy.deepcopy(metrics)):
        assert type(twin) is FewShotMetrics and twin.groups == metrics.groups and twin.novel == NOVEL
        assert twin.results_dict == metrics.results_dict and twin.summary() == metrics.summary()
    assert "harmonic mean" in str(metrics) and "novel: {2, 3}" in repr(metrics)
    unused = pickle.loads(pickle.dumps(FewShotMetrics()))
    assert unused.results_dict == DetMetrics().results_dict


@pytest.mark.parametrize(("a", "b", "mean"), [(0.2, 0.6, 0.3), (0.5, 0.5, 0.5), (0, 0.5, 0), (0.5, 0, 0), (0, 0, 0)])
def test_harmonic_mean(a, b, mean):
    assert harmonic_mean(a, b) == pytest.approx(mean)
