"""Strict TOML for frozen dataclasses: errors name the misspelt key or mistyped value."""

from __future__ import annotations

import json
import os
import re
import stat
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from peptrain.errors import ConfigError
from peptrain.settings.fields import as_path, check, nearest, shown

T = TypeVar("T")
HEADER = "recipe"
"""The table with the description of a file, such as a recipe's title and source."""
TASKS = "tasks"
"""The table with the settings of a fine-tuning that depend on its task, in [tasks.NAME]."""
LARGEST_FILE = 1 << 20
"""Bytes. The largest recipe has 3,200."""
LEAVES = (str, int, float, bool)
"""Types of settings, apart from paths."""
DEEPEST = 32
"""Levels of tables and lists in a file. A grid has 4."""


def read(path: Path, given_as: str = "--config ") -> dict[str, Any]:
    """Return the table in `path`. Raise ConfigError if the file is missing or not TOML.

    `given_as` is the flag that precedes the path in the message.
    """
    try:
        text = _bytes(path).decode()
        _check_dots(text)
        table = tomllib.loads(text)
        _check_depth(table)
    except OSError as error:
        raise ConfigError(f"{given_as}{path}: {error.strerror}") from error
    except RecursionError as error:
        raise ConfigError(f"{given_as}{path}: not a configuration: nested too deeply") from error
    except ValueError as error:  # also an integer of thousands of digits
        raise ConfigError(f"{given_as}{path}: not TOML: {error}") from error
    return table


def _bytes(path: Path) -> bytes:
    """Read a file. A pipe, which might wait for its writer, and a large file raise ValueError."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("not a regular file; save the settings in one")
        found = file.read(LARGEST_FILE + 1)
    if len(found) > LARGEST_FILE:
        raise ValueError(f"larger than {LARGEST_FILE >> 20} MiB")
    return found


def _check_dots(text: str) -> None:
    """Raise RecursionError for a key of many parts, a.b.c, which takes tomllib quadratic time."""
    unspaced = text.translate(dict.fromkeys(map(ord, " \t")))
    if any(part.count(".") > DEEPEST for part in re.split(r"[=,{[\n]", unspaced)):
        raise RecursionError


def _check_depth(table: dict[str, Any]) -> None:
    inner: list[Any] = [table]
    for _ in range(DEEPEST + 1):
        children = [v.values() if isinstance(v, dict) else v for v in inner]
        inner = [v for each in children for v in each if isinstance(v, dict | list)]
    if inner:
        raise RecursionError


def parse(cls: type[T], table: Mapping[str, Any], prefix: str) -> T:
    """Return a `cls` with the values of `table`. Every key must be a field of the right type."""
    hints = get_type_hints(cls)
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    for key in table:
        if key not in known:
            raise ConfigError(unknown(key, known, prefix, getattr(cls, "name", "")))
    return cls(
        **{key: parse_value(hints[key], value, prefix + key) for key, value in table.items()}
    )


def for_task(table: Mapping[str, Any], task: str) -> dict[str, Any]:
    """Return the table of a file for a task: with `tune.task`, and with what [tasks.TASK] has.

    task: empty for none. Raises ConfigError if the file has [tasks], but not this one.
    """
    made = {**table}
    own = _of_task(made.pop(TASKS), task) if TASKS in made else {}
    for sections in (own, {"tune": {"task": task}} if task else {}):
        for name, values in sections.items():
            made[name] = _over(made.get(name, {}), values)
    return made


def _of_task(tasks: Any, task: str) -> Mapping[str, Any]:
    """Return [tasks.TASK] of the table [tasks]."""
    for table in (tasks, *tasks.values()) if isinstance(tasks, Mapping) else (tasks,):
        check(isinstance(table, Mapping) and bool(table), TASKS, table,
              "tables, [tasks.NAME], with settings such as optim.lr = 1e-4")  # fmt: skip
    wanted = f"one of {', '.join(tasks)}, for which there are settings"
    check(task in tasks, "tune.task", task or None, wanted)
    own: Mapping[str, Any] = tasks[task]
    return own


def _over(section: Any, values: Any) -> Any:
    """Return a section with other values for some keys. What is no table is left to `parse`."""
    if isinstance(section, Mapping) and isinstance(values, Mapping):
        return {**section, **values}
    return values if isinstance(section, Mapping) else section


def untypable(cls: type) -> str | None:
    """Return the name of a field of a dataclass whose type no TOML value has, None if all do."""
    hints = get_type_hints(cls)
    return next((f.name for f in fields(cls) if not _typable(hints[f.name])), None)


def _typable(hint: Any) -> bool:
    if get_origin(hint) in (Union, UnionType):
        return all(option is type(None) or _typable(option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return all(type(choice) in LEAVES for choice in get_args(hint))
    return hint in (*LEAVES, Path)


def unknown(key: str, known: Sequence[str], prefix: str = "", owner: str = "") -> str:
    """Return the message for an unknown key, with the nearest known key or else all of them."""
    listed = ", ".join(prefix + name for name in known) or "none"
    hint = nearest(key, known, prefix).rstrip() or (
        f"{owner} has {listed}" if owner else f"known are {listed}"
    )
    return f"{prefix}{key}: unknown key; {hint}"


def parse_value(hint: Any, value: Any, key: str) -> Any:
    """Return `value` as the type `hint`, a dataclass or a leaf. Errors name it by `key`."""
    if is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key}: must be a table, [{key}] (got {shown(value)})")
        return parse(hint, value, f"{key}.")  # type: ignore[arg-type]
    if type(value) is int:
        check(-(2**63) <= value < 2**63, key, value, "a number of 64 bits")
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    for option in options:
        if get_origin(option) is Literal and value in get_args(option):
            return value
        if option is Path and isinstance(value, str):
            return as_path(value, key)
        if option is float and type(value) in (int, float):
            return float(value)
        if option in (str, int, bool) and type(value) is option:
            return value
    raise ConfigError(f"{key}: {shown(value)} has the wrong type or value; give {_wanted(options)}")


def _wanted(options: tuple[Any, ...]) -> str:
    names = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}
    listed: list[str] = []
    for option in options:
        if get_origin(option) is Literal:
            listed += [repr(choice) for choice in get_args(option)]
        elif option is not type(None):
            listed.append(names.get(option, "a path in quotes"))
    return " or ".join(listed)


def _is_unset(leaf: Field[Any], value: object) -> bool:
    return value is None


def dump(config: Any, leave_out: Callable[[Field[Any], object], bool] = _is_unset) -> str:
    """Return a dataclass of leaves and sections as TOML.

    Leaves for which `leave_out(field, value)` is true are left out, by default those that are None.
    So is a section that older versions don't have (`added_section`) if it has no leaves left.
    Raises ConfigError for a text or path that is not UTF-8, which TOML can't express.
    """
    return "\n".join(_lines(config, leave_out))


def _lines(config: Any, leave_out: Callable[[Field[Any], object], bool]) -> Iterator[str]:
    yield from _leaves(config, leave_out, "")  # before any section, or they would be part of it
    for section in fields(config):
        value = getattr(config, section.name)
        if not is_dataclass(value):
            continue
        leaves = list(_leaves(value, leave_out, f"{section.name}."))
        if section.metadata.get("added") and not leaves:
            continue
        yield f"[{section.name}]"
        name = getattr(type(value), "name", None)
        if isinstance(name, str):
            yield f"name = {_literal(name)}"
        yield from leaves
        yield ""


def _leaves(
    section: Any, leave_out: Callable[[Field[Any], object], bool], prefix: str
) -> Iterator[str]:
    for leaf in fields(section):
        value = getattr(section, leaf.name)
        unsaid = value is None and leaf.metadata.get("before") is not None
        assert not unsaid, f"{leaf.name}: None would be read as {leaf.metadata['before']!r}"
        if not is_dataclass(value) and not leave_out(leaf, value):
            check(isinstance(value, (*LEAVES, Path)), f"{prefix}{leaf.name}", value,
                  "a string, a number, true or false, or config.toml can't contain it")  # fmt: skip
            try:
                text = _literal(value)
                text.encode()
            except UnicodeEncodeError as error:
                raise ConfigError(
                    f"{prefix}{leaf.name}: {shown(str(value))} is not UTF-8, so config.toml can't"
                    " contain it; rename it"
                ) from error
            yield f"{leaf.name} = {text}"


def _literal(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value)
    # JSON strings are valid TOML, except that TOML requires DEL to be escaped.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
