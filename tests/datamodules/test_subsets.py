"""Which parts of a data set are reported apart."""

import pytest

from drpo_lightning.datamodules.subsets import subsets


def rows(*pairs):
    return [{"data_set": d, "category": c} for d, c in pairs]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], {}),
        ([{}, {}], {}),
        (rows(("a", None), ("a", None)), {}),
        (rows(("a", "x"), ("a", "x")), {}),
        (rows(("a", "x"), ("a", "y")), {"x": {0}, "y": {1}}),
        (rows(("a", None), ("b", None), ("a", None)), {"a": {0, 2}, "b": {1}}),
        (rows(("b", "x"), ("a", "x"), ("a", "y")), {"a": {1, 2}, "a/x": {1}, "a/y": {2}, "b": {0}, "b/x": {0}}),
        ([{"category": 3}, {"category": 4}, {}], {"3": {0}, "4": {1}}),
        ([{"category": "x"}, {}], {"x": {0}}),
    ],
)
def test_rows_of_each_data_set_and_category(given, expected):
    found = subsets(given)
    assert found == expected
    assert list(found) == list(expected)
