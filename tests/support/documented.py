"""The commands that README and docs show, and a dry execution of each: all of the command line except the work itself.

A block of commands that not everyone can run has a comment before it that says what they need, such as `<!-- needs: gpu -->`.
`python -m tests.support.documented` lists all commands with their needs; PLACEHOLDERS is where these come from.
"""

import json
import re
import shlex
from collections.abc import Iterator
from contextlib import ExitStack, chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import typer.main
from markdown_it import MarkdownIt
from markdown_it.token import Token

from alignbench import registry
from alignbench.backbone import Backbone
from alignbench.backbones import families
from alignbench.cli.app import app
from alignbench.comparison.grid import SETTINGS
from alignbench.comparison.planning import Request, plan_grid
from alignbench.config.run_config import RunConfig
from alignbench.evaluation.evaluate import MetricSuite
from alignbench.files.yaml_files import to_yaml
from alignbench.load import load_configured_objective, load_sampler
from alignbench.scoring.score import _task
from alignbench.settings import validate
from alignbench.tasks import configured_task
from tests.support.command_line import ROOT, in_this_process

MARKDOWN = MarkdownIt("commonmark").enable("table")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELL = ("", "sh", "bash", "shell", "console")
"""Languages of blocks that may hold commands."""
CALLED = re.compile(r"(^|\s)(python -m |-m )?alignbench\s")
STARTS = re.compile(r"(python -m )?alignbench\s")
ASSIGNED = re.compile(r'(\w+)="([^"]*)"')
VARIABLE = re.compile(r"\$(\w+)")
OWN = re.compile(r"(?<![/\w])(my_rloo|mine)(?![\w-])")
"""The objectives of readers; `vargrad` stands in for them."""
NEEDS = {
    "gpu": "a GPU, and the published weights of a model",
    "weights": "weights of a model that does not ship with the repository",
    "files": "files, a service or a cluster of your own",
}
PLACEHOLDERS = {
    r"models/[\w.-]+": "gpu",
    r"(geneval_coco|mask2former|hpsv2|aesthetic|FOLDER)": "weights",
    r"(my\.yaml|my_task\.yaml|prompts\.csv|my_losses:\w+|PROMPTS|FILE\b(?!\.)|HOST|127\.0\.0\.1)": "files",
    r"(--backbone|--pipeline) DIR": "weights",
    r"--images DIR|--engine ray": "files",
}
"""What the parts of a command that stand for something else need."""
NAMES = {"objective": "tmpo", "sampler": "independent", "eval": "pickscore", "serve-scorer": "pickscore", "backbone": "tiny"}
"""What stands in for NAME after a word."""
PIPELINES = {"models/sd3.5-medium": "StableDiffusion3Pipeline", "models/flux.1-dev": "FluxPipeline", "DIR": "SanaPipeline"} | {
    "models/qwen-image": "QwenImagePipeline",
    "models/z-image-turbo": "ZImagePipeline",
    "models/wan2.1-1.3b": "WanPipeline",
}
COMPARED = Request(objectives=["tmpo", "grpo"], samplers=["dynamic_tree"])
"""The comparison in `results/mine`, which is a run as well."""
RUNS = ("RUN", "A", "B", "C", "results/mine", "results/first")
FILES = {
    "my.yaml": "seed: 1\n",
    "my_task.yaml": "description: signs\ntrain_prompts: prompts.txt\neval_prompts: held_out.txt\nreward: [{eval: quality}]\n",
    "prompts.txt": 'a sign that says "OPEN"\na sign that says "SALE"\n',
    "held_out.txt": 'a sign that says "EXIT"\n',
    "held_out.jsonl": '{"prompt": "a photo of a bench"}\n',
    "eval.jsonl": '{"prompt": "a photo of a bench"}\n',
    "train.jsonl": '{"prompt": "a photo of a bus"}\n',
    "results/tuning/tuned.yaml": "objectives: [tmpo, grpo]\nsamplers: [dynamic_tree]\n",
}
WORK = {
    "run": ("alignbench.training.run.run", "alignbench.forecast.costs.forecast"),
    "compare": ("alignbench.comparison.runner.compare", "alignbench.comparison.estimates.expected_costs"),
    "tune": ("alignbench.tuning.tune.run_tuning",),
    "front": ("alignbench.frontier.making.front_of",),
    "eval": (
        "alignbench.scoring.score.score_model",
        "alignbench.scoring.score.score_images",
        "alignbench.scoring.protocol_grid.score_grid",
    ),
    "check": ("alignbench.authoring.checking.subject_of", "alignbench.trial.trial.put_on_trial"),
    "diagnose": ("alignbench.diagnosis.diagnose.diagnose", "alignbench.diagnosis.gradients.diagnose_gradients"),
    "pairs": ("alignbench.load.load_configured_backbone",),
    "prompts": ("alignbench.tasks.geneval_prompts.write",),
    "new": ("alignbench.authoring.scaffold.new",),
    "export": ("alignbench.training.exporting.export",),
    "serve-scorer": ("alignbench.scoring.serving.serve",),
    "train-tiny": ("alignbench.embedded.train_tiny.train_tiny",),
    "train-pickscore": ("alignbench.embedded.train_pickscore.train_pickscore",),
}
"""Where the work of a command begins. `list` and `show` are executed as they are, and of the others the options are read."""


@dataclass(frozen=True)
class Command:
    """A command on a page.

    Attributes:
        place: page and line, for messages.
        words: its arguments after `alignbench`.
        marked: what the comment before its block says that it needs; None if there is no block.
    """

    place: str
    words: tuple[str, ...]
    marked: frozenset[str] | None

    @property
    def text(self) -> str:
        """The command as one line."""
        return shlex.join(self.words)

    @property
    def needs(self) -> set[str]:
        """What it needs, by PLACEHOLDERS."""
        return {need for pattern, need in PLACEHOLDERS.items() if re.search(pattern, " ".join(self.words))}


class Reached(Exception):  # noqa: N818
    """The command has come to its work."""


def commands(page: Path) -> Iterator[Command]:
    """All commands of a page, those in its blocks and those within a line."""
    marked: frozenset[str] = frozenset()
    for token in MARKDOWN.parse(page.read_text(encoding="utf-8")):
        place = _place(page, token)
        if token.type == "html_block" and (comment := re.match(r"<!-- needs: (.*?) -->", token.content)):
            marked = frozenset(comment.group(1).split(", "))
        elif token.type in ("code_block", "fence") and token.info in SHELL:
            for line in _expanded(token.content.replace("\\\n", " ").splitlines()):
                yield from (Command(place, words, marked) for words in _in_line(line))
            marked = frozenset()
        elif token.type == "inline":
            spans = [child.content for child in token.children or () if child.type == "code_inline"]
            for span in filter(STARTS.match, spans):
                yield from (Command(place, words, None) for words in _in_line(span))


def _expanded(lines: list[str]) -> Iterator[str]:
    """The lines of a block with the values of its shell variables."""
    variables: dict[str, str] = {}
    for line in lines:
        if assigned := ASSIGNED.fullmatch(line.strip()):
            variables[assigned[1]] = assigned[2]
        yield VARIABLE.sub(lambda used: variables.get(used[1], used[0]), line)


def commands_outside_code(page: Path) -> Iterator[str]:
    """The places where a command is set as text, such as in an indented block that belongs to a list."""
    for token in MARKDOWN.parse(page.read_text(encoding="utf-8")):
        if any(child.type == "text" and "python -m alignbench" in child.content for child in token.children or ()):
            yield _place(page, token)


def _place(page: Path, token: Token) -> str:
    shown = page.relative_to(ROOT) if page.is_relative_to(ROOT) else page.name
    return f"{shown}:{token.map[0] + 1}" if token.map else str(shown)


def _in_line(line: str) -> Iterator[tuple[str, ...]]:
    """The arguments of each call of alignbench in a line of a shell; several are separated by semicolons."""
    if not CALLED.search(line):
        return
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
    lexer.whitespace_split = True
    words = [*lexer, ";"]
    while words:
        end = next(i for i, word in enumerate(words) if word in (";", "&&", "|"))
        call, words = words[:end], words[end + 1 :]
        if call[:1] == ["alignbench"]:
            yield tuple(call[1:])
        elif "-m" in call and call[call.index("-m") + 1 :][:1] == ["alignbench"]:
            yield tuple(call[call.index("-m") + 2 :])


def make_workplace(folder: Path) -> None:
    """Makes a folder that has what the commands of all pages read."""
    for place, pipeline in PIPELINES.items():
        (folder / place).mkdir(parents=True)
        (folder / place / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    for run in RUNS:
        (folder / run).mkdir(parents=True)
        (folder / run / "config.yaml").write_text(to_yaml(RunConfig().resolved()))
    (folder / "results/mine" / SETTINGS).write_text(to_yaml(plan_grid(COMPARED).model_dump(exclude_none=True)))
    for file, text in FILES.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
    for kept in ("gaussian_mixture", "tiny"):
        (folder / "results" / kept).symlink_to(ROOT / "results" / kept)


def problem(command: Command, workplace: Path) -> str | None:
    """What the command line says against a command, short of doing the work; None if nothing."""
    words = [_standing_in(word, before) for before, word in zip(("", *command.words), command.words, strict=False)]
    name = words[0]
    if name not in (*WORK, "list", "show"):
        return _unread(words)
    work: list[mock.Mock] = []
    with ExitStack() as stack:
        for target in WORK.get(name, ()):
            work.append(stack.enter_context(mock.patch(target, side_effect=Reached)))
        try:
            ended = in_this_process(*words, cwd=workplace)
        except Reached:
            ended = None
    if ended is not None:
        return None if ended.returncode == 0 and name not in WORK else ended.stderr or "ends before its work begins"
    with chdir(workplace):
        return next((_refusal(made.call_args) for made in work if made.called), None)


def _standing_in(word: str, before: str) -> str:
    if word == "NAME":
        return NAMES[before.removeprefix("--")]
    return OWN.sub("vargrad", word)


def _unread(words: list[str]) -> str | None:
    """Reads the options of a command that is not executed."""
    group = typer.main.get_command(app)
    try:
        context = group.make_context("alignbench", list(words))
        _, command, rest = group.resolve_command(context, list(words))  # type: ignore[attr-defined]
        command.make_context(words[0], rest, parent=context)
    except Exception as error:
        return str(error)
    return None


def _refusal(call: Any) -> str | None:
    """Checks the plug-ins, settings and task of the configurations that a command was about to work with."""
    values = [*call.args, *call.kwargs.values()]
    nested = [item for value in values if isinstance(value, list) for item in value]
    configs = [getattr(value, "config", value) for value in [*values, *nested]]
    evals = {key: call.kwargs[key] for key in ("evals", "settings") if key in call.kwargs}
    try:
        for config in configs:
            if isinstance(config, RunConfig):
                _check(config)
                MetricSuite(_task(config, evals.get("evals", ()), evals.get("settings", {})), config.scorer_timeout)
    except Exception as error:
        return str(error)
    return None


def _check(config: RunConfig) -> None:
    if ":" not in config.objective.name:
        load_configured_objective(config)
    load_sampler(config.sampler.name, **config.sampler.settings)
    configured_task(config)
    cls = registry.find("backbones", families.opener(config.backbone.name), Backbone)
    path = {"path": config.backbone.name} if families.is_folder(config.backbone.name) else {}
    validate(cls.Settings, {**path, **config.backbone.settings}, where=config.backbone.name)


if __name__ == "__main__":
    for shown in PAGES:
        for documented in commands(shown):
            needed = f"  # needs {', '.join(sorted(documented.needs))}" if documented.needs else ""
            print(f"{documented.place}: {documented.text}{needed}")
