"""Hooks of the docs site (`mkdocs.yml`): they lay it out as the repository is, and add one page per module of the reference.

Every page keeps its place in the repository (`README.md`, `docs/guide.md`), so a relative link that works on a code host works
on the site as well. Only the links of notebooks are rewritten, because MkDocs leaves them as they are. Files outside `docs/`
that a page links or shows are brought in with the page.
"""

import ast
import posixpath
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
FRONT = "README.md"
REFERENCE = "reference"
STYLE = "site.css"
TARGET = re.compile(r"\]\(<?([^)\s>]+)")


@event_priority(100)  # before the plug-ins, so that they find the files in their places
def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Replaces the files of `docs/` by the same files at their places in the repository, and adds what they link."""
    own = [file for file in files if file.src_dir == config.docs_dir]
    laid_out = Files([file for file in files if file.src_dir != config.docs_dir])  # those of the theme
    waiting = [FRONT, *(f"docs/{file.src_uri}" for file in own if file.inclusion.is_included())]
    while waiting:
        place = waiting.pop()
        if laid_out.get_file_from_path(place) is None:
            laid_out.append(File(place, str(ROOT), config.site_dir, config.use_directory_urls))
            waiting += linked(place) if place.endswith(".md") else []
    modules = list(dict.fromkeys([*config.extra["reference"], *(module for module, _ in public_names())]))
    pages = {"index": overview(modules)} | {module: f"# {module}\n\n::: {module}\n" for module in modules}
    for name, text in pages.items():
        laid_out.append(File.generated(config, f"{REFERENCE}/{name}.md", content=text))
    laid_out.append(File.generated(config, STYLE, content=(ROOT / "docs" / "site" / STYLE).read_text(encoding="utf-8")))
    config.nav = with_folders(config.nav, list(laid_out.src_uris))
    return laid_out


def on_page_content(html: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leads the links of a notebook to pages instead of their sources."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html

    def led(link: re.Match[str]) -> str:
        source = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), link[1]))
        target = files.get_file_from_path(source)
        return f'href="{target.url_relative_to(page.file)}{link[2] or ""}"' if target else link[0]

    return re.sub(r'href="([^"#:]+\.(?:md|ipynb))(#[^"]*)?"', led, html)


def linked(page: str) -> list[str]:
    """The files of the repository that a page links, by their places in it."""
    targets = (urlsplit(target) for target in TARGET.findall((ROOT / page).read_text(encoding="utf-8")))
    paths = (posixpath.join(posixpath.dirname(page), unquote(target.path)) for target in targets if not target.scheme)
    return [place for place in map(posixpath.normpath, paths) if (ROOT / place).is_file()]


def with_folders(item: Any, places: list[str]) -> list[Any]:
    """The items of the navigation that an item stands for: a folder, whose path ends with a slash, stands for its pages."""
    if isinstance(item, dict):
        return [{title: with_folders(content, places)} for title, content in item.items()]
    if isinstance(item, list):
        return [entry for content in item for entry in with_folders(content, places)]
    if not item.endswith("/"):
        return [item]
    pages = [place for place in places if posixpath.dirname(place) + "/" == item and place.endswith(".md")]
    return sorted(pages, key=lambda place: (posixpath.basename(place) not in ("README.md", "index.md"), place))


def public_names() -> list[tuple[str, str]]:
    """What can be imported from `alignbench`: module and name."""
    package = ast.parse((ROOT / "alignbench/__init__.py").read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(package) if isinstance(node, ast.ImportFrom)]
    pairs = [(node.module or "", alias.name) for node in imports for alias in node.names]
    return sorted(pair for pair in pairs if pair[0].startswith("alignbench."))


def overview(modules: list[str]) -> str:
    """The first page of the reference: the public names, and the modules that have a page."""
    lines = ["# Reference", "", "These names can be imported from `alignbench`:", "", "| name | |", "|---|---|"]
    lines += [f"| [`{name}`][{module}.{name}] | {first_line(module, name)} |" for module, name in public_names()]
    lines += ["", "The modules on which plug-ins and scripts build:", "", "| module | |", "|---|---|"]
    lines += [f"| [`{module}`]({module}.md) | {first_line(module)} |" for module in modules]
    return "\n".join(lines) + "\n"


def first_line(module: str, name: str | None = None) -> str:
    """The first line of the docstring of a module, or of a class or function in it."""
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    nodes = [node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name]
    text = ast.get_docstring(nodes[0] if nodes else tree) or ""
    return text.partition("\n")[0].replace("|", "\\|")
