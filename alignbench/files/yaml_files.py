"""The one door through which YAML comes in and goes out: configurations, tasks, presets, studies, records and `--set`.

What stands in a file is what is read. The rules are those of YAML 1.2's core schema, narrowed to decimal numbers, and not those
of YAML 1.1, by which PyYAML reads `1e-4` as a text, `012` as 10, `1:30` as 90, `no` as false and a date as a date:

- `true` and `false` are truths, `null`, `~` and nothing at all are null; both may be written Null or NULL, True or TRUE.
- `12` and `-3` are whole numbers. `1e-4`, `0.50`, `.5` and `.inf` are floats; they remember how they were written, so that a
  setting that is a text gets exactly that (a folder called `1.10`).
- Everything else is a text: `no`, `012`, `1_000`, `0x10`, `1:30`, `2024-01-01`. A setting that is a number then takes it for
  the number that stands there (12, 1000), or refuses it.
- Keys are texts, whatever they look like.

A key that stands twice is refused (`<<` merges, and what is merged may be overridden), and so are tags that make anything else
than these values, files that are large, nested deeply, or unfold through aliases.
"""

import math
import re
from pathlib import Path
from typing import Any

import yaml

from alignbench.errors import UserError
from alignbench.files.paths import placed

MAX_BYTES = 2**20
"""Of a YAML file: thousands of times what a study has."""
MAX_VALUES = 100_000
"""Keys and values of one text, those that aliases repeat included."""
MAX_DEPTH = 50
"""Lists and mappings inside one another."""

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
    """A float that remembers how it was written; `str` gives that back."""

    text: str

    def __new__(cls, text: str) -> "WrittenFloat":
        self = super().__new__(cls, text)
        self.text = text
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:  # so that it can be copied, and sent to another process
        return (self.text,)

    def __str__(self) -> str:
        return self.text


def read_yaml(file: Path, what: str = "config file") -> dict[str, Any]:
    """Keys and values of a YAML file, with paths that begin with `./`, `../` or `~/` made absolute (`alignbench.files.paths`).

    Args:
        what: the file is called in errors.

    Raises:
        UserError: the file cannot be read, or holds anything else; the sentence names the line.
    """
    try:
        with file.open("rb") as opened:
            content = opened.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"cannot read the {what} {file}: {error.strerror}") from None
    except ValueError as error:  # a name that no file has
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
    """What a YAML text holds: None, bool, int, float, str, lists and dictionaries with texts as keys, none of them shared.

    Raises:
        ValueError: one line that says where and why it cannot be read.
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
        raise ValueError(f"line {line}: a character that no YAML may hold ({chr(int(error.character))!a})") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def parse_value(text: str) -> Any:
    """The value of `key=value` on a command line.

    A list, a mapping and a text in quotes are YAML. Anything else is one plain value from its first letter to its last: `#` and
    `: ` mean nothing in it.

    Raises:
        ValueError: one line that says why it cannot be read.
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
    """YAML from which the same data is read, also by readers of YAML 1.1; keys in order, letters as they are."""
    options: dict[str, Any] = {"Dumper": _Dumper, "sort_keys": False, **style}
    text = yaml.dump(data, allow_unicode=True, **options)
    if set(text) & set("\x85\u2028\u2029\ufeff"):  # PyYAML writes these as they are, and reads them as ends of lines
        text = yaml.dump(data, **options)
    return str(text)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  (as PyYAML has it)


class _Dumper(yaml.SafeDumper):
    """Puts into quotes what YAML 1.1 or this module would take for something else than a text, and repeats what is shared."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, _pattern, _first in _RESOLVERS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"{_PREFIX}{_name}", re.compile(rf"(?:{_pattern})\Z"), list(_first))
_Dumper.add_representer(WrittenFloat, lambda dumper, value: dumper.represent_scalar(f"{_PREFIX}float", value.text))


class _Builder:
    """Builds the data of a composed document."""

    def __init__(self) -> None:
        self.values = 0
        self.above: list[yaml.Node] = []

    def value(self, node: yaml.Node) -> Any:
        self.values += 1
        if self.values > MAX_VALUES:
            raise ValueError(f"it unfolds to more than {MAX_VALUES:,} values; write less, or fewer aliases")
        if node.tag not in _TAGS:
            tag = node.tag.replace(_PREFIX, "!!")
            raise ValueError(
                f"{_line(node.start_mark)}the tag {tag} makes no setting; leave it out, or write the value as a text"
            )
        if isinstance(node, yaml.ScalarNode):
            return _plain(node.tag, node.value, _line(node.start_mark))
        if any(node is outer for outer in self.above):
            raise ValueError(f"{_line(node.start_mark)}it holds itself by an alias")
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
                raise ValueError(f"{where}the key {key.value!r} stands on {lines[key.value]} already; keep one of them")
            lines[key.value] = where.removesuffix(": ")
            if key.tag == _MERGE:
                for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    if not isinstance(source, yaml.MappingNode):
                        raise ValueError(f"{where}<< merges mappings, and this is none")
                    merged = {**self.value(source), **merged}  # of several the first wins
            else:
                own[key.value] = self.value(value)
        return {**merged, **own}


def _plain(tag: str, text: str, where: str = "") -> Any:
    """The value of a scalar with that tag, which the reader found by how it is written, or the user gave."""
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
    raise ValueError(f"{where}{text!r} is not a value of the tag !!{kind}")  # which was given


def _float(text: str) -> float | str:
    named = re.fullmatch(r"([-+]?)\.(inf|nan)", text.lower())
    if named:
        return float(named[1] + named[2])
    number = WrittenFloat(text)
    if not math.isfinite(number):  # too large: as a number it would be another
        return text
    return float(number) if text == repr(float(number)) else number


def _decoded(content: bytes) -> str:
    """The text of a file, without its byte-order mark."""
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
        return "a tab, where YAML takes blanks alone"
    if problem.startswith("mapping values are not allowed"):
        return f"{problem}; a text with ': ' in it needs quotes"
    return problem
