"""Writes a working plug-in and its test as a starting point: `python -m alignbench new KIND NAME`."""

import importlib.util
import keyword
import re
from dataclasses import dataclass
from pathlib import Path

import alignbench
from alignbench import registry
from alignbench.errors import DiskError, UserError, did_you_mean
from alignbench.files.writing import write_new

KINDS = {"objective": "objectives", "sampler": "samplers", "scorer": "evals", "backbone": "backbones"}
"""For each kind that can be written, its name in `registry.PACKAGES`."""

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Scaffold:
    """The files that were written.

    Attributes:
        plugin, test: the two files.
        handle: the value for options such as `--objective`: the name, or `module:Class` outside a checkout.
        next: the commands to continue with, as lines to print.
    """

    plugin: Path
    test: Path
    handle: str
    next: str


def new(kind: str, name: str, out: Path | None = None) -> Scaffold:
    """Writes a plug-in and its test from the templates of its kind.

    In a checkout they go where the registry and pytest look. In any other folder, and in `out`, they lie side by side, and the
    plug-in is named as `module:Class`.

    Args:
        kind: one of `KINDS`.
        name: name of the plug-in.
        out: folder of both files; None chooses it.

    Raises:
        UserError: the kind is unknown, the name cannot be used or is taken, or a file exists or cannot be written.
    """
    if kind not in KINDS:
        raise UserError(f"there is no template for {kind!r}{did_you_mean(kind, KINDS)}")
    if not re.fullmatch("[a-z][a-z0-9_]{0,39}", name) or keyword.iskeyword(name):
        raise UserError(
            f"{name!r} cannot be the name of a plug-in: use up to 40 lower-case letters, digits and underscores, with a letter "
            "first, and not a Python keyword"
        )
    if name in registry.names(KINDS[kind]):
        raise UserError(f"there is already a plug-in {name!r} among the {KINDS[kind]}; choose another name")
    in_checkout = out is None and Path("alignbench", "registry.py").is_file()
    folder = Path(*registry.PACKAGES[KINDS[kind]].split(".")) if in_checkout else out or Path()
    plugin, test = folder / f"{name}.py", (Path("tests") / folder if in_checkout else folder) / f"test_{name}.py"
    for file in (plugin, test):
        if file.exists():
            raise UserError(f"{file} exists already; choose another name, or move it away")
    if not in_checkout and (spec := importlib.util.find_spec(name)) and spec.origin:
        raise UserError(f"{plugin} would hide the Python module {name!r}; choose another name")
    templates = [(TEMPLATES / f"{prefix}{kind}.py.jinja").read_text(encoding="utf-8") for prefix in ("", "test_")]
    class_name = _class_name(name, kind, "".join(templates))
    handle = name if in_checkout else f"{name}:{class_name}"
    texts = [_render(template, name=name, class_name=class_name, handle=handle) for template in templates]
    for file, text in zip((plugin, test), texts, strict=True):
        _write(file, text)
    if in_checkout:
        first = [f"python -m pytest {test}", f"python -m alignbench list {KINDS[kind]}"]
    else:
        # `module:Class` is looked up in the current folder.
        first = [*([] if folder.resolve() == Path.cwd() else [f"cd {folder}"]), f"python -m pytest {test.name}"]
    if kind != "scorer":
        first.append(f"python -m alignbench check --{kind} {handle}")
    package = Path("alignbench") if in_checkout else Path(alignbench.__file__).parent
    return Scaffold(plugin, test, handle, "\n".join(["next:", *(f"  {c}" for c in first), *_run(kind, name, handle, package)]))


def _class_name(name: str, kind: str, templates: str) -> str:
    """`my_loss` becomes `MyLoss`; the kind is appended if that is a word of Python or of the templates."""
    camel = "".join(part.capitalize() for part in name.split("_"))
    taken = keyword.iskeyword(camel) or re.search(rf"\b{camel}\b", templates)
    return camel + kind.capitalize() if taken else camel


def _render(template: str, **values: str) -> str:
    import jinja2  # imported here because no other command needs it

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(template).render(values)


def _write(file: Path, text: str) -> None:
    try:
        write_new(file, lambda path: path.write_text(text, encoding="utf-8"))
    except DiskError as error:
        raise UserError(str(error)) from None


def _run(kind: str, name: str, handle: str, package: Path) -> list[str]:
    """The command that tries the plug-in, and the task that a scorer or a backbone needs for it."""
    run, out = "  python -m alignbench run --preset smoke", f"--out results/{name}"
    if kind in ("objective", "sampler"):
        return [f"{run} --{kind} {handle} {out}"]
    # Tasks choose scorers. Images of an untrained model do not contain what the tasks that ship reward.
    scorer, label = (handle, name) if kind == "scorer" else ("quality", "sharpness")
    return [
        f"{run} --task {name}.yaml{'' if kind == 'scorer' else f' --backbone {handle}'} {out}",
        "",
        f"{name}.yaml is a task, for instance:",
        f"  description: rewards {label}",
        f"  train_prompts: {package / 'tasks' / 'geneval' / 'train.txt'}",
        f"  eval_prompts: {package / 'tasks' / 'geneval' / 'eval.txt'}",
        "  reward:",
        f"    - eval: {scorer}",
        f"      label: {label}",
        "  judges:",
        "    - eval: diversity",
    ]
