"""Reads and writes all YAML: configurations, tasks, presets, studies, records and `--set`.

The rules are those of YAML 1.2's core schema, restricted to decimal numbers. They are not those of YAML 1.1, by which PyYAML
reads `1e-4` as a text, `012` as 10, `1:30` as 90, `no` as false and a date as a date:

- `true` and `false` are booleans; `null`, `~` and an empty value are null. They may also be written True or TRUE, Null or NULL.
- `12` and `-3` are integers. `1e-4`, `0.50`, `.5` and `.inf` are floats. Floats remember how they were written, so that a
  setting whose type is text gets exactly that text (a folder called `1.10`).
- Everything else is a text: `no`, `012`, `1_000`, `0x10`, `1:30`, `2024-01-01`. A setting whose type is a number converts such
  a text (to 12 or 1000), or refuses it.
- Keys are texts, whatever they look like.

A repeated key is refused (`<<` merges mappings, and merged keys may be overridden). So are tags for any other kind of value,
and files that are large, deeply nested, or become large through aliases."""

import math
import re
from pathlib import Path
from typing import Any

import yaml

from alignbench.errors import UserError
from alignbench.files.paths import placed

MAX_BYTES = 2**20
"""Largest YAML file, thousands of times larger than a study."""
MAX_VALUES = 100_000
"""Largest number of keys and values of one text, including those that aliases repeat."""
MAX_DEPTH = 50
"""Largest nesting depth of lists and mappings."""

_PREFIX = "tag:yaml.org,2002:"
_RESOLVERS = (
    ("null", r"~|null|Null|NULL|", ("~", "n", "N", "")),
    ("bool", r"true|True|TRUE|false|False|FALSE", tuple("tTfF")),
    ("int", r"0|-?[1-9][0-9]*", tuple("-0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        tuple("-+.0123456789"),
    ),
    ("merge", r"<<", ("<",)),
)
_MERGE = f"{_PREFIX}merge"
_TAGS = {f"{_PREFIX}{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}


class WrittenFloat(float):
    """A float that remembers how it was written; `str` returns that text."""

    text: str

    def __new__(cls, text: str) -> "WrittenFloat":
        self = super().__new__(cls, text)
        self.text = text
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:  # so that it can be copied and pickled
        return (self.text,)

    def __str__(self) -> str:
        return self.text


def read_yaml(file: Path, what: str = "config file") -> dict[str, Any]:
    """Reads the keys and values of a YAML file, and makes paths that begin with `./`, `../` or `~/` absolute.

    Args:
        file: the file to read.
        what: what the file is, for messages.

    Raises:
        UserError: the file cannot be read, or does not hold keys and values; the message names the line.
    """
    try:
        with file.open("rb") as opened:
            content = opened.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"cannot read the {what} {file}: {error.strerror}") from None
    except ValueError as error:  # a name that a file cannot have
        raise UserError(f"cannot read the {what} {file}: {error}") from None
    try:
        data = parse(_decoded(content))
    except ValueError as error:
        raise UserError(f"the {what} {file} is not valid YAML: {error}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(f"the {what} {file} must hold keys and values, not {type(data).__name__}")
    return dict(placed(data, file.parent))


def parse(text: str) -> Any:
    """Parses a YAML text into None, bool, int, float, str, lists, and dictionaries with texts as keys; no value is shared.

    Raises:
        ValueError: the text cannot be read; one line says where and why.
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES // 2**20} MiB")
    try:
        node = yaml.compose(text, Loader=_Loader)
        return None if node is None else _Builder().value(node)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ValueError(f"{_line(mark)}{_problem(error)}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, int(error.position)) + 1
        raise ValueError(f"line {line}: a character that YAML does not allow ({chr(int(error.character))!a})") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def parse_value(text: str) -> Any:
    """Parses the value of `key=value` on a command line.

    Lists, mappings and quoted texts are YAML. Anything else is a single plain value as a whole: `#` and `: ` have no special
    meaning in it.

    Raises:
        ValueError: the value cannot be read; one line says why.
    """
    text = text.strip()
    if text.startswith(("[", "{", '"', "'", "!")):
        try:
            yaml.compose(text, Loader=_Loader)
        except (yaml.YAMLError, RecursionError):
            raise ValueError(f"a text that begins with {text[0]} needs quotes around it") from None
        return parse(text)
    return _plain(_Loader("").resolve(yaml.ScalarNode, text, (True, False)), text)


def to_yaml(data: Any, **style: Any) -> str:
    """Writes data as YAML that readers of YAML 1.1 understand as well; keys keep their order, characters are not escaped."""
    options: dict[str, Any] = {"Dumper": _Dumper, "sort_keys": False, **style}
    text = yaml.dump(data, allow_unicode=True, **options)
    if set(text) & set("\x85\u2028\u2029\ufeff"):  # PyYAML writes these unescaped and reads them as line ends
        text = yaml.dump(data, **options)
    return str(text)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  (as in PyYAML)


class _Dumper(yaml.SafeDumper):
    """Quotes texts that YAML 1.1 or this module would not read as texts, and writes shared values repeatedly."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, _pattern, _first in _RESOLVERS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"{_PREFIX}{_name}", re.compile(rf"(?:{_pattern})\Z"), list(_first))
_Dumper.add_representer(WrittenFloat, lambda dumper, value: dumper.represent_scalar(f"{_PREFIX}float", value.text))


class _Builder:
    """Builds the data of a parsed document."""

    def __init__(self) -> None:
        self.values = 0
        self.above: list[yaml.Node] = []

    def value(self, node: yaml.Node) -> Any:
        """Builds the value of a node; raises ValueError for what is not supported."""
        self.values += 1
        if self.values > MAX_VALUES:
            raise ValueError(f"it has more than {MAX_VALUES:,} values; shorten it, or use fewer aliases")
        if node.tag not in _TAGS:
            tag = node.tag.replace(_PREFIX, "!!")
            raise ValueError(f"{_line(node.start_mark)}the tag {tag} is not supported; remove it, or write the value as a text")
        if isinstance(node, yaml.ScalarNode):
            return _plain(node.tag, node.value, _line(node.start_mark))
        if any(node is outer for outer in self.above):
            raise ValueError(f"{_line(node.start_mark)}an alias makes it contain itself")
        if len(self.above) >= MAX_DEPTH:
            raise ValueError(f"{_line(node.start_mark)}it is nested too deeply, more than {MAX_DEPTH} levels")
        self.above.append(node)
        built = [self.value(item) for item in node.value] if isinstance(node, yaml.SequenceNode) else self._mapping(node)
        self.above.pop()
        return built

    def _mapping(self, node: yaml.Node) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        own: dict[str, Any] = {}
        lines: dict[str, str] = {}
        for key, value in node.value:
            where = _line(key.start_mark)
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"{where}a key must be a text, not a list or a mapping")
            if key.value in lines:
                raise ValueError(f"{where}the key {key.value!r} is already on {lines[key.value]}; remove one of them")
            lines[key.value] = where.removesuffix(": ")
            if key.tag == _MERGE:
                for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    if not isinstance(source, yaml.MappingNode):
                        raise ValueError(f"{where}<< merges mappings, but this is not a mapping")
                    merged = {**self.value(source), **merged}  # the first of several mappings wins
            else:
                own[key.value] = self.value(value)
        return {**merged, **own}


def _plain(tag: str, text: str, where: str = "") -> Any:
    """The value of a scalar with a tag, which comes from how the scalar is written, or from the user."""
    kind = tag.removeprefix(_PREFIX)
    if kind in ("str", "merge"):  # << as a value
        return text
    if kind == "null" and text.lower() in ("~", "null", ""):
        return None
    if kind == "bool" and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        if kind == "int":
            return int(text)
        if kind == "float":
            return _float(text)
    except ValueError:
        pass
    if kind == "int" and text.isdecimal():  # Python refuses thousands of digits
        raise ValueError(f"{where}a whole number must fit into 64 bits")
    raise ValueError(f"{where}{text!r} is not a value of the tag !!{kind}")  # a tag from the user


def _float(text: str) -> float | str:
    named = re.fullmatch(r"([-+]?)\.(inf|nan)", text.lower())
    if named:
        return float(named[1] + named[2])
    number = WrittenFloat(text)
    if not math.isfinite(number):  # too large for a float, so it stays a text
        return text
    return float(number) if text == repr(float(number)) else number


def _decoded(content: bytes) -> str:
    """Decodes a file's content, without its byte-order mark."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("it is UTF-16; save it as UTF-8")
    if len(content) > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES // 2**20} MiB")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line}: it is not UTF-8; save it as UTF-8") from None


def _line(mark: Any) -> str:
    return "" if mark is None else f"line {mark.line + 1}: "


def _problem(error: yaml.MarkedYAMLError) -> str:
    problem = " ".join(str(error.problem or error.context or error).split())
    if "'\\t'" in problem:
        return "a tab, but YAML allows only spaces here"
    if problem.startswith("mapping values are not allowed"):
        return f"{problem}; a text with ': ' in it needs quotes"
    return problem
