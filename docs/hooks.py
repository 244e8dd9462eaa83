"""What the site takes from outside docs/: linked files, the project's own pages, commands and settings.

In a checkout a page links to a source file by its place, `../src/rove/train.py`. In the site each file or
folder that is linked to so becomes a page below source/, so that no link leads out of it and nothing has to
know where the repository is hosted.
"""

from __future__ import annotations

import argparse
import ast
import os
import posixpath
import re
from functools import partial
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PROJECT = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Markdown files of the repository's root -> their pages."""
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")
LEXERS = {".py": "python", ".json": "json"}
HELP, SETTINGS = "<!-- the help of every command -->", "<!-- every setting -->"
ASIDE = "---\nsearch:\n  exclude: true\nhide: [navigation, toc]\n---\n\n"
"""Head of a page that is reached by links alone."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the project's pages, and a page for each source file or folder that a page links to."""
    for name, page in PROJECT.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text()))
    linked = {
        target
        for page in files.documentation_pages()
        for link in LINK.findall(page.content_string)
        if (target := _outside(page.src_uri, link))
    }
    folders = [target for target in linked if (ROOT / target).is_dir()]
    inside = {f"{folder}/{path.name}" for folder in folders for path in _listed(folder)}
    for target in sorted(linked | inside):
        text = _folder(target) if target in folders else _file(target)
        files.append(File.generated(config, _page_of(target), content=ASIDE + text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to what lies outside docs/ into links to its page; fill in commands and settings."""
    uri = page.file.src_uri
    if uri.startswith("source/"):
        return markdown
    if HELP in markdown:
        markdown = markdown.replace(HELP, _help())
    if SETTINGS in markdown:
        markdown = markdown.replace(SETTINGS, _settings(ROOT / "src/rove/config/schema.py"))
    return LINK.sub(partial(_relinked, uri), markdown)


def _relinked(uri: str, match: re.Match[str]) -> str:
    place = _in_repository(uri, match[1])
    if target := _outside(uri, match[1]):
        place = f"docs/{_page_of(target)}"
    elif place in PROJECT:
        place = f"docs/{PROJECT[place]}"
    elif uri not in PROJECT.values():
        return match[0]
    return f"]({posixpath.relpath(place, posixpath.dirname(f'docs/{uri}'))}"


def _in_repository(uri: str, link: str) -> str:
    """The file that a page's link names, relative to the repository."""
    folder = "" if uri in PROJECT.values() else posixpath.dirname(f"docs/{uri}")
    return posixpath.normpath(posixpath.join(folder, link))


def _outside(uri: str, link: str) -> str | None:
    """The file or folder that a page's link names, where it exists and is to become a page below source/."""
    place = _in_repository(uri, link)
    if place.startswith(("docs/", "../")) or place in PROJECT or not (ROOT / place).exists():
        return None
    return place


def _page_of(target: str) -> str:
    return f"source/{target}.md"


def _listed(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).iterdir() if path.suffix in LEXERS)


def _folder(target: str) -> str:
    name = posixpath.basename(target)
    return f"# {target}\n\n" + "\n".join(f"- [{p.name}]({name}/{p.name}.md)" for p in _listed(target)) + "\n"


def _file(target: str) -> str:
    path = ROOT / target
    return f"# {target}\n\n``````{LEXERS.get(path.suffix, 'text')}\n{path.read_text()}\n``````\n"


def _help() -> str:
    """`rove --help` and that of every command, as headings and listings."""
    from rove.cli import COMMANDS
    from rove.cli.parsing import build_parser

    os.environ["COLUMNS"] = "80"  # argparse wraps to it
    parser = build_parser(COMMANDS)
    chosen = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    shown = {"rove": parser, **{f"rove {name}": sub for name, sub in chosen.choices.items()}}
    return "\n\n".join(f"## {name}\n\n```text\n{sub.format_help()}```" for name, sub in shown.items())


def _settings(schema: Path) -> str:
    """A table for each class of settings, Run first: a row a field, with its type, default and docstring."""
    classes = [node for node in ast.parse(schema.read_text()).body if isinstance(node, ast.ClassDef)]
    classes.sort(key=lambda node: node.name != "Run")
    names = {node.name for node in classes}
    return "\n\n".join(_table(node, names) for node in classes)


def _table(settings: ast.ClassDef, classes: set[str]) -> str:
    rows = []
    # A field's docstring is the statement after it.
    for field, after in zip(settings.body, [*settings.body[1:], ast.Pass()], strict=True):
        if not isinstance(field, ast.AnnAssign) or "ClassVar" in ast.unparse(field.annotation):
            continue
        kind = ast.unparse(field.annotation)
        default = f" = {ast.unparse(field.value)}" if field.value else ", needed"
        meaning = " ".join(after.value.value.split()) if isinstance(after, ast.Expr) else ""
        meaning = meaning.replace("|", "&#124;")  # else it ends the cell
        classes_of = [f"[{name}](#{name})" for name in re.findall(r"\w+", kind) if name in classes]
        lines = [f"`{kind}{default}`", *classes_of, *([meaning] if meaning else [])]
        rows.append(f"| `{ast.unparse(field.target)}` | {'<br>'.join(lines)} |")
    head = f"## {settings.name} {{ #{settings.name} }}\n\n{ast.get_docstring(settings) or ''}\n\n"
    return head + "| setting | type and default |\n| --- | --- |\n" + "\n".join(rows)
