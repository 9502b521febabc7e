"""Tables read from a file (TOML, JSON), checked against the fields of a dataclass."""

import types
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from wnq.names import did_you_mean

Table = TypeVar("Table")

NAMES = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    dict: "a table",
    tuple: "an array",
    type(None): "nothing",
}


def check_keys(given: Iterable[str], accepted: Iterable[str], where: str) -> None:
    """Raise ``ValueError`` with the closest name if a key is not accepted."""
    known = list(accepted)
    for key in given:
        if key not in known:
            raise ValueError(f"{where} has no key {key!r}.{did_you_mean(key, known)} It takes: {', '.join(known)}.")


def check_table(table: object, where: str) -> Mapping[str, Any]:
    """Return ``table`` if it is one, else raise ``ValueError``."""
    if not isinstance(table, Mapping):
        raise ValueError(f"{where} must be a table, got {table!r}.")
    return table  # pyright: ignore[reportUnknownVariableType]


def from_table(kind: type[Table], table: object, where: str) -> Table:
    """Build a dataclass from a table.

    Raises:
        ValueError: an unknown key (with the closest one), a value of the wrong type, or one that the dataclass refuses.
    """
    hints = get_type_hints(kind)
    given = check_table(table, where)
    check_keys(given, hints, where)
    values = {key: check_type(value, hints[key], f"{where} {key}") for key, value in given.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where} {error}") from None


def check_type(value: object, hint: Any, where: str) -> Any:
    """Return a value in the type of an annotation; integers pass as floats, arrays become tuples.

    Raises:
        ValueError: the value has another type.
    """
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        kind = get_origin(option) or option
        if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if kind is tuple and isinstance(value, (list, tuple)):
            item = get_args(option)[0]
            return tuple(check_type(v, item, f"{where}[{i}]") for i, v in enumerate(value))  # pyright: ignore[reportUnknownArgumentType]
        if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
            return value
    names = " or ".join(NAMES[get_origin(option) or option] for option in options)
    raise ValueError(f"{where} must be {names}, got {value!r}.")
