import pytest

from yolo_fewshot.class_names import AMBIGUOUS, UNKNOWN, check_unambiguous, match_classes, repeated

X, A = UNKNOWN, AMBIGUOUS


@pytest.mark.parametrize(
    ("names", "classes", "expected"),
    [
        ("abc", "abc", [0, 1, 2]),
        ("ca", "abc", [2, 0]),
        ("abd", "abc", [0, 1, X]),
        ("aba", "aba", [0, 1, 2]),  # in order, as stock counts them
        ("aba", "abac", [0, 1, 2]),  # c was enrolled
        ("abac", "aba", [0, 1, 2, X]),  # c was not
        ("abac", "abadc", [0, 1, 2, 4]),
        ("aab", "baa", [A, A, 0]),
        ("ab", "aba", [A, 1]),  # the model has two of them
        ("aab", "ab", [A, A, 1]),  # the data has
        ("aab", "b", [X, X, 0]),
    ],
)
def test_label_indices_are_matched_by_name_and_repeated_names_by_index(names, classes, expected):
    index = match_classes(dict(enumerate(names)), dict(enumerate(classes)))
    assert list(index) == list(range(len(names))) and list(index.values()) == expected


def test_names_that_are_numbers_are_names():
    assert match_classes({0: 7, 1: "b"}, {0: "b", 1: "7"}) == {0: 1, 1: 0}
    assert repeated([7, "b", "7", "c", "b"]) == ["7", "b"] and repeated("abc") == []


def test_only_ambiguous_labels_in_use_are_an_error():
    names = dict(enumerate("aab"))
    index = match_classes(names, dict(enumerate("baa")))
    check_unambiguous(names, index, [2], "data.yaml")
    with pytest.raises(ValueError, match=r"Labels of 'data.yaml' .* called a, and not at the same indices\. List all"):
        check_unambiguous(names, index, [0, 1, 2], "data.yaml")
