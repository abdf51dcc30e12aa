import pytest

from yolo_fewshot.errors import few


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (([],), ""),
        ((["a"],), "a"),
        ((list("abcde"),), "a, b, c, d, e"),
        ((list("abcdef"),), "a, b, c, d, e and 1 more"),
        ((list("abcdefgh"), "; "), "a; b; c; d; e and 3 more"),
        ((list("abc"), "; ", 3), "a; b; c"),
        ((list("abcd"), " + ", 2), "a + b and 2 more"),
    ],
)
def test_a_few_are_named_and_the_rest_counted(args, text):
    assert few(*args) == text
