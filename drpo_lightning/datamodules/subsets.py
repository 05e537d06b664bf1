"""Parts of a data set that are reported apart."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any


def subsets(rows: Sequence[dict[str, Any]]) -> dict[str, set[int]]:
    """Numbers of the rows of each data set, and of each category within it.

    A row's data set is in its column `data_set`, its category in `category`. A subset that all rows belong to is left
    out, and so are rows that do not say.

    Args:
        rows: the data set.

    Returns:
        Row numbers by `<data set>`, and by `<category>`, or by `<data set>/<category>` if there are several data sets;
        in order of names.
    """
    by_name: dict[str, set[int]] = defaultdict(set)
    several = len({row.get("data_set") for row in rows}) > 1
    for number, row in enumerate(rows):
        data_set, category = row.get("data_set"), row.get("category")
        prefix = [str(data_set)] if several and data_set is not None else []
        if prefix:
            by_name[prefix[0]].add(number)
        if category is not None:
            by_name["/".join([*prefix, str(category)])].add(number)
    return {name: by_name[name] for name in sorted(by_name) if len(by_name[name]) < len(rows)}
