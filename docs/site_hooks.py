"""Pages of the site from files at the root: the front page is README.md.

mkdocs calls the functions of this module (`hooks` of mkdocs.yml).
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]

#: Pages by the file that they are made from. Links between these files and docs/ are rewritten.
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}

#: A reference of reStructuredText in a docstring, as the site would show it: the role in letters, the target as code.
ROLE = re.compile(r":(?:class|func|meth|attr|mod|data|exc):\s*<code>~?([\w.]+)</code>")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages made from files at the root."""
    for name, page in PAGES.items():
        content = _on_the_site((ROOT / name).read_text(encoding="utf-8"))
        if page == "index.md":
            content = f"---\nhide: [navigation]\n---\n{content}"
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Let links from docs/ to files at the root lead to their pages."""
    return re.sub(r"\]\(((?:\.\./)+)([A-Z]+\.md)", lambda link: "](" + _page(link), markdown)


def on_page_content(content: str, **_: object) -> str:
    """Make references of docstrings links to the reference, where it has the name."""
    return ROLE.sub(_link, content)


def _link(role: re.Match[str]) -> str:
    name = role[1].split(".")[-1]
    shown = f"<code>{name}</code>"
    target = _described().get(name)
    return f'<autoref optional identifier="{target}">{shown}</autoref>' if target else shown


@cache
def _described() -> dict[str, str]:
    """Return what the reference describes: full names by their last parts."""
    pages = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "docs" / "api").glob("*.md"))
    return {full.split(".")[-1]: full for full in re.findall(r"^::: ([\w.]+)", pages, re.MULTILINE)}


def _on_the_site(text: str) -> str:
    """Return the text of a file at the root with links as they are in docs/."""
    text = text.replace("](docs/", "](")
    for name, page in PAGES.items():
        text = text.replace(f"]({name}", f"]({page}")
    return text


def _page(link: re.Match[str]) -> str:
    return link[1].removeprefix("../") + PAGES[link[2]]
