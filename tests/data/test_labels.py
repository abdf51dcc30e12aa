import cv2
import numpy as np
import pytest

from yolo_fewshot.data.labels import read_labels


@pytest.fixture
def image(tmp_path):
    file = tmp_path / "1.png"
    cv2.imwrite(str(file), np.zeros((20, 40, 3), np.uint8))
    return file


def labeled(image, *rows):
    image.with_suffix(".txt").write_text("".join(f"{row}\n" for row in rows))
    return str(image), str(image.with_suffix(".txt"))


def test_boxes_and_shape_are_read(image):
    files = labeled(image, "1 0.5 0.25 0.1 0.2", "0 0.5 0.5 1 1")
    labels = read_labels(*files, nc=2)
    np.testing.assert_allclose(labels.boxes, [[1, 0.5, 0.25, 0.1, 0.2], [0, 0.5, 0.5, 1, 1]])
    assert labels.shape == (20, 40) and labels.found and labels.error == labels.note == ""


def test_polygons_become_boxes(image):
    files = labeled(image, "0 0.1 0.1 0.3 0.1 0.3 0.5 0.1 0.5")
    np.testing.assert_allclose(read_labels(*files, nc=1).boxes, [[0, 0.2, 0.3, 0.2, 0.4]], rtol=1e-6)


@pytest.mark.parametrize("label_file", ["", "missing.txt"])
def test_an_image_without_a_label_file_is_background(image, label_file):
    labels = read_labels(str(image), label_file, nc=1)
    assert labels.boxes.shape == (0, 5) and not labels.found and not labels.error


def test_an_empty_label_file_is_found(image):
    labels = read_labels(*labeled(image), nc=1)
    assert labels.boxes.shape == (0, 5) and labels.found and not labels.error


@pytest.mark.parametrize("row, text", [("3 0.5 0.5 0.1 0.1", "class 3 exceeds"), ("0 0.5 0.5 2 0.1", "out of bounds")])
def test_an_error_is_the_reason_without_file_name_and_prefix(image, row, text):
    labels = read_labels(*labeled(image, row), nc=2)
    assert labels.boxes.shape == (0, 5) and labels.shape == (0, 0) and labels.found and labels.note == ""
    assert text in labels.error and "ignoring corrupt" not in labels.error and str(image) not in labels.error


def test_an_image_that_cannot_be_read_is_an_error(image):
    image.write_bytes(b"no image")
    labels = read_labels(str(image), "", nc=2)
    assert labels.error and labels.boxes.shape == (0, 5) and not labels.found


def test_what_is_corrected_is_a_note(image):
    labels = read_labels(*labeled(image, *["0 0.5 0.5 0.1 0.1"] * 2), nc=1)
    assert len(labels.boxes) == 1 and not labels.error and labels.note == "1 duplicate labels removed"
