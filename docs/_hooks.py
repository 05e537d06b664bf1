"""What mkdocs is told beyond mkdocs.yml: pages made of files elsewhere, and links that fit the site.

Links in docs/*.md and README.md are those of the repository. In the site they lead to the page that a file has become;
a file that is no page is named, without a link.
"""

import html
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "benchmarks/README.md": "benchmarks.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
"""Files of the repository that are pages as they are."""
QUICKSTART = ("Two commands", "Commands", "Installation")
"""Sections of the README that make the page."""
LISTINGS = {"configs": ("configurations.md", "yaml"), "examples": ("examples.md", "python")}
"""Folders whose files are shown on one page, with the language."""
API = (
    *("objectives", "functional", "modules", "datamodules", "callbacks", "rollout", "rewards", "metrics", "report"),
    "batch",
)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#]+)(#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:  # noqa: ANN401 - mkdocs' own types are not exported
    """Adds the pages that are no files of `docs`."""
    pages = {page: linked((ROOT / source).read_text(), source) for source, page in PAGES.items()}
    readme = (ROOT / "README.md").read_text()
    quickstart = "\n\n".join(section(readme, title) for title in QUICKSTART)
    pages["quickstart.md"] = linked(f"# Quickstart\n\n{quickstart}", "README.md")
    pages |= {page: listing(folder, language) for folder, (page, language) in LISTINGS.items()}
    pages |= {f"api/{name}.md": f"# drpo_lightning.{name}\n\n::: drpo_lightning.{name}\n" for name in API}
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:  # noqa: ANN401
    """Turns the links of a page of `docs`."""
    return markdown if page.file.generated_by else linked(markdown, f"docs/{page.file.src_uri}")


def section(text: str, title: str) -> str:
    """A section of a Markdown text, with its heading."""
    found = re.search(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"README.md has no section {title!r}"
    return found[0].strip()


def listing(folder: str, language: str) -> str:
    """A page with every file of a folder."""
    paths = sorted((ROOT / folder).glob({"python": "*.py", "yaml": "*.yaml"}[language]))
    parts = [f"## {p.name} {{#{p.stem}}}\n\n```{language}\n{p.read_text().strip()}\n```" for p in paths]
    return "\n\n".join([f"# {folder.capitalize()}", *parts]) + "\n"


def linked(text: str, source: str) -> str:
    """A text whose links to files of the repository fit the site.

    Args:
        text: Markdown.
        source: the file that it stands in, from the root of the repository.
    """

    def turned(link: re.Match[str]) -> str:
        image, label, target, anchor = link[1], link[2], link[3], link[4] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if "://" in target or not (ROOT / path).exists():
            return link[0]  # elsewhere; or nowhere, which mkdocs says
        where = place(path)
        return f"{image}[{label}]({where}{anchor})" if where else label if "`" in label else f"`{label}`"

    return "\n".join(cells(line) if line.startswith("|") else line for line in LINK.sub(turned, text).split("\n"))


def cells(row: str) -> str:
    """A row of a table with code whose pipes need no backslash, which would be shown."""

    def code(span: re.Match[str]) -> str:
        return f"<code>{html.escape(span[1]).replace(chr(92) + '|', '&#124;')}</code>"

    return re.sub(r"`([^`]*\\\|[^`]*)`", code, row)


def place(path: str) -> str | None:
    """Where a file of the repository stands in the site; None if it does not."""
    folder, _, rest = path.partition("/")
    if path in PAGES:
        return PAGES[path]
    if folder == "docs":
        return rest
    if folder in LISTINGS and rest:
        return f"{LISTINGS[folder][0]}#{Path(rest).stem}"
    part = rest.partition("/")[0].removesuffix(".py")
    return f"api/{part}.md" if folder == "drpo_lightning" and part in API else None
