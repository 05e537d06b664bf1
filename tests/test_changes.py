"""Differences of settings are those that matter, once each."""

import pytest

from drpo_lightning.changes import changes


def an(path, **arguments):
    return {"class_path": path, "init_args": arguments}


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ({"a": {"b": 1, "c": [1]}}, {"a": {"b": 1, "c": [1]}}, []),
        ({"a": {"b": 1}}, {"a": {"b": 2, "c": 3}}, ["a.b: 1 -> 2", "a.c: None -> 3"]),
        ({"a": [1, 2]}, {"a": []}, ["a: [1, 2] -> []"]),
        ({"a": an("x.A", b=1, c=2)}, {"a": an("x.B", d=3)}, ["a: x.A -> x.B"]),
        ({"a": an("x.A", b=1)}, {"a": an("x.A", b=2)}, ["a.init_args.b: 1 -> 2"]),
        ({"a": {"class": "A", "b": 1}}, {"a": {"class": "B", "b": 2}}, ["a: A -> B"]),
        ({"a": None}, {"a": an("x.A")}, ["a: None -> x.A"]),
        # One more in front, and the last gone: the one in the middle is the same.
        (
            {"a": [an("x.A", b=1), an("x.C")]},
            {"a": [an("x.B"), an("x.A", b=1)]},
            ["a.C: x.C -> None", "a.B: None -> x.B"],
        ),
        ({"a": []}, {"a": [an("x.A")]}, ["a.A: None -> x.A"]),
        ({"a": [an("x.A", b=1), an("x.A")]}, {"a": [an("x.A", b=1), an("x.A", b=2)]}, ["a.A 2.init_args.b: None -> 2"]),
    ],
)
def test_changes_are_named(before, now, expected):
    assert [str(change) for change in changes(before, now)] == expected
