import json
import os
import shutil

import cv2
import numpy as np
import pytest
from ultralytics.utils import YAML

from yolo_fewshot.evaluate import plan, provenance
from yolo_fewshot.evaluate.report import COLUMNS


@pytest.fixture
def describe(hand_made):
    """A function that returns the content of benchmark.json."""

    def record(counts=(1,), seeds=2, background=None, save=False, **settings):
        data = plan.read_data(hand_made, hand_made / "old.yaml", {0: "cat"})
        draws = plan.find_shots(hand_made, list(counts), seeds, "novel").values()
        sums = provenance.digests(data, draws, False, background)
        return provenance.provenance(data, sums, {}, settings, {"save": save})

    return record


def replace(file, text):
    """Change a file, which may be in a new folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


ALL = "data.yaml, novel_1shot_seed0, novel_1shot_seed1"
CHANGES = {
    "a query's label": (lambda x: replace(x / "labels/query/0.txt", "0 0.5 0.5 0.4 0.5\n"), ALL),
    "no label": (lambda x: (x / "labels/query/1.txt").unlink(), ALL),
    "a query's name": (lambda x: (x / "images/query/1.bmp").rename(x / "images/query/2.bmp"), ALL),
    "another query": (lambda x: cv2.imwrite(str(x / "images/query/1.bmp"), np.zeros((32, 16, 3), np.uint8)), ALL),
    "a shot's label": (lambda x: replace(x / "labels/shots/1.txt", ""), "novel_1shot_seed1"),
    "redrawn shots": (lambda x: replace(x / "novel_1shot_seed0.txt", "./images/shots/1.bmp\n"), "novel_1shot_seed0"),
    "a base image's label": (lambda x: replace(x / "labels/old/1.txt", ""), "base_val"),
    "the names": (lambda x: YAML.save(x / "data.yaml", YAML.load(x / "data.yaml") | {"note": "x"}), "data.yaml"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_results_of_other_data_at_the_same_place_are_refused(hand_made, describe, tmp_path, case):
    provenance.write(tmp_path, describe())
    for x in hand_made.rglob("*.*"):
        os.utime(x, (0, 0))  # the same content
    provenance.compare(tmp_path, describe())
    change, parts = CHANGES[case]
    change(hand_made)
    with pytest.raises(
        ValueError, match=rf"has results of other images, labels or files of {parts}\. Set another out="
    ):
        provenance.compare(tmp_path, describe())


def test_results_with_other_ignore_regions_are_refused(hand_made, describe, tmp_path):
    shots = YAML.load(hand_made / "novel_1shot.yaml")
    YAML.save(hand_made / "novel_1shot.yaml", shots | {"fewshot": {"ignore": "ignore"}})
    provenance.write(tmp_path, describe())
    replace(hand_made / "ignore/shots/1.txt", "0.2 0.2 0.1 0.1\n")
    with pytest.raises(ValueError, match=r"images, labels or files of novel_1shot_seed1\. Set"):
        provenance.compare(tmp_path, describe())


def test_results_with_other_background_images_are_refused(hand_made, describe, tmp_path):
    folder = str(shutil.copytree(hand_made / "images/old", tmp_path / "street"))
    provenance.write(tmp_path, describe(background=folder))
    provenance.compare(tmp_path, describe(background=folder))
    (tmp_path / "street/0.bmp").unlink()
    with pytest.raises(ValueError, match=r"images, labels or files of background\. Set another out="):
        provenance.compare(tmp_path, describe(background=folder))


def test_rows_of_other_versions_are_told_and_recorded(describe, tmp_path, caplog):
    old, record = describe(), describe()
    old["versions"] |= {"ultralytics": "8.4.1", "torch": f"2.0 and {record['versions']['torch']}"}
    provenance.write(tmp_path, old)
    provenance.compare(tmp_path, record)
    assert record["versions"] == describe()["versions"] and not caplog.text  # no rows yet
    (tmp_path / "rows.csv").write_text(",".join(COLUMNS) + "\n")
    provenance.compare(tmp_path, record)
    now = describe()["versions"]
    assert record["versions"] == old["versions"] | {"ultralytics": f"8.4.1 and {now['ultralytics']}"}
    assert f"has results of ultralytics 8.4.1; what is missing is measured with {now['ultralytics']}" in caplog.text
    assert "torch" not in caplog.text
    record["machine"] |= {"gpu": "A", "cores": 1}
    provenance.write(tmp_path, record)
    again = describe()
    provenance.compare(tmp_path, again)
    assert (
        again["machine"]["gpu"] == f"A and {describe()['machine']['gpu']}" and "has results of cores 1;" in caplog.text
    )


@pytest.mark.parametrize("begun", ["rows.csv", "runs/full_seed0.pt", None])
def test_settings_are_compared_once_something_was_measured_or_trained(describe, tmp_path, begun):
    provenance.write(tmp_path, describe(batch=64))
    if begun:
        replace(tmp_path / begun, ",".join(COLUMNS) + "\n")
        with pytest.raises(ValueError, match=r"has results of other settings: batch=64\. Set another out="):
            provenance.compare(tmp_path, describe(batch=16))
    else:
        provenance.compare(tmp_path, describe(batch=16))


def test_base_images_count_where_methods_learn_from_them(hand_made):
    shutil.copy(hand_made / "old.yaml", hand_made / "base.yaml")
    for name in ("data", "novel_1shot"):
        YAML.save(hand_made / f"{name}.yaml", YAML.load(hand_made / f"{name}.yaml") | {"names": {0: "dog", 1: "cat"}})
    data = plan.read_data(hand_made, None, {0: "cat"})
    draws = plan.find_shots(hand_made, [1], 1, "novel").values()
    assert list(provenance.digests(data, draws, False)) == ["data.yaml", "novel_1shot_seed0"]
    before = provenance.digests(data, draws, True)
    replace(hand_made / "labels/old/0.txt", "0 0.5 0.5 0.4 0.5\n")
    after = provenance.digests(data, draws, True)
    assert [k for k in before if before[k] != after[k]] == ["base.yaml"] and before.keys() == after.keys()


def test_a_continued_run_may_have_other_draws_whose_digests_are_kept(hand_made, describe, tmp_path):
    first = describe(seeds=1)
    provenance.write(tmp_path, first)
    YAML.save(hand_made / "novel_2shot_seed0.yaml", YAML.load(hand_made / "novel_1shot.yaml"))
    record = describe(counts=(2,), seeds=1)
    provenance.compare(tmp_path, record)
    assert record["data_sha256"].keys() == {"data.yaml", "base_val", "novel_1shot_seed0", "novel_2shot_seed0"}
    assert record["data_sha256"].items() >= first["data_sha256"].items()
    provenance.write(tmp_path, record)
    replace(hand_made / "novel_1shot_seed0.txt", "./images/shots/1.bmp\n")
    with pytest.raises(ValueError, match=r"files of novel_1shot_seed0\. Set"):
        provenance.compare(tmp_path, describe(counts=(1, 2), seeds=1))


def test_results_of_an_earlier_version_without_digests_are_accepted(describe, tmp_path):
    record = describe()
    old = {k: v for k, v in record.items() if k != "data_sha256"}
    (tmp_path / "benchmark.json").write_text(json.dumps(old))
    provenance.compare(tmp_path, record)
    assert len(record["data_sha256"]) == 4
