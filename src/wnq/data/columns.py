"""Which column of a table holds the images, which one the labels, and what the labels are."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def select_columns(
    name: str, features: Mapping[str, Any], image_column: str | None, label_column: str | None
) -> tuple[str, str]:
    """Return the names of the image and the label column.

    Args:
        name: what messages call the table.
        features: ``datasets`` feature of each column.
        image_column: given by the user; None: the one column of images (``Image``, or a struct of bytes and path).
        label_column: given by the user; None: the one column of class labels, or the one called fine_label or label.

    Raises:
        ValueError: there is no such column, or there are several to choose from.
    """
    images = [column for column, feature in features.items() if _is_image(feature)]
    labels = [column for column, feature in features.items() if type(feature).__name__ == "ClassLabel"]
    by_name = [column for column in ("fine_label", "label") if column in features]
    if len(labels) != 1 and len([column for column in by_name if not labels or column in labels]) == 1:
        labels = [column for column in by_name if not labels or column in labels]
    return (
        _choose(name, "image", image_column, images, features),
        _choose(name, "label", label_column, labels, features),
    )


def labels_and_classes(name: str, column: Any, feature: Any) -> tuple[Tensor, tuple[str, ...]]:
    """Turn a column of labels into int64 labels and the names of their classes.

    Integers keep their value; without names their class is called by its number. Strings are numbered in sorted order.

    Args:
        name: what messages call the table.
        column: arrow array of integers or strings.
        feature: its ``datasets`` feature.

    Raises:
        ValueError: a label is missing or negative (as in a split without published labels), or of another type.
    """
    values: list[Any] = column.to_pylist()
    if not values:
        raise ValueError(f"{name} holds no rows")
    if any(value is None or (isinstance(value, int) and value < 0) for value in values):
        raise ValueError(f"{name}: some images have no label (null or negative); choose another split or label_column=")
    names: list[str] | None = getattr(feature, "names", None)
    if all(isinstance(value, str) for value in values):
        classes = tuple(sorted(set(values)))
        number = {label: index for index, label in enumerate(classes)}
        return torch.tensor([number[value] for value in values], dtype=torch.int64), classes
    if not all(isinstance(value, int) for value in values):
        raise ValueError(f"{name}: labels must be integers or strings, got {feature}; set label_column=")
    labels = torch.tensor(values, dtype=torch.int64)
    return labels, tuple(names) if names else tuple(str(index) for index in range(int(labels.max()) + 1))


def _is_image(feature: Any) -> bool:
    return type(feature).__name__ == "Image" or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})


def _choose(name: str, role: str, given: str | None, found: list[str], features: Mapping[str, Any]) -> str:
    columns = ", ".join(features)
    if given is not None:
        if given not in features:
            raise ValueError(f"{name}: no column {given!r}; the columns are: {columns}; set {role}_column=")
        return given
    if len(found) != 1:
        which = f"several columns could be the {role}" if found else f"no column is evidently the {role}"
        raise ValueError(f"{name}: {which}; set {role}_column= to one of: {columns}")
    return found[0]
