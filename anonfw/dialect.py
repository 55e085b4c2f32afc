"""The YAML that recipes are written in: YAML with 1.2's plain scalars, duplicate keys refused, and line numbers kept.

PyYAML alone reads `1e-4` as text, `off` as false and `1:30` as 90. Here a scalar is null, true, false, an int, a float
or text, and `dump` quotes whatever `parse` would read as something else.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0x[0-9a-fA-F]+|[0-9][0-9_]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
    ("merge", r"<<", ["<"]),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict = {}

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - PyYAML's signature; a resolved recipe has no anchors
        return True


for _name, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _first)


def _int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node).replace("_", "")
    return int(text, 16) if "0x" in text else int(text, 10)


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    # Left to itself PyYAML folds U+0085 and its like into spaces when it writes plain or single-quoted text.
    odd = not value.replace("\n", "").isprintable()
    style = '"' if odd else "|" if "\n" in value.strip("\n") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Loader.add_constructor("tag:yaml.org,2002:int", _int)
_Dumper.add_representer(str, _text)


class DialectError(ValueError):
    """Text that is not a recipe's YAML. `line` counts from 1."""

    def __init__(self, text: str, line: int) -> None:
        super().__init__(text)
        self.line = line


def parse(text: str) -> tuple[Any, dict[str, int]]:
    """The value of one YAML document, and the line (from 1) of each dotted key in it.

    Raises:
        DialectError: a syntax error, a duplicate or non-text key, an unknown tag, a value that contains itself.
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, {}
        lines: dict[str, int] = {}
        _walk(node, "", lines, ())
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise DialectError(f"not YAML: {error.problem or error.context}", line) from None
    except yaml.YAMLError as error:
        raise DialectError(f"not YAML: {error}", 1) from None
    finally:
        if loader is not None:
            loader.dispose()


def dump(value: Any) -> str:
    """YAML text that `parse` reads back as the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=118)


def join(prefix: str, key: str | int) -> str:
    """A dotted key: `join("losses", 0)` is `losses.0`."""
    return f"{prefix}.{key}" if prefix else str(key)


def _walk(node: yaml.Node, prefix: str, lines: dict[str, int], above: tuple[yaml.Node, ...]) -> None:
    line = node.start_mark.line + 1
    if any(node is parent for parent in above):
        raise DialectError(f"{prefix}: the value contains itself", line)
    lines.setdefault(prefix, line)
    if isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            _walk(child, join(prefix, index), lines, (*above, node))
    elif isinstance(node, yaml.MappingNode):
        seen = set()
        for key, child in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.tag != "tag:yaml.org,2002:str":
                raise DialectError(f"{join(prefix, key.value)}: a key must be text; quote it", key.start_mark.line + 1)
            if key.value in seen:
                raise DialectError(f"{join(prefix, key.value)}: written twice", key.start_mark.line + 1)
            seen.add(key.value)
            lines[join(prefix, key.value)] = key.start_mark.line + 1
            _walk(child, join(prefix, key.value), lines, (*above, node))
