"""Hook of mkdocs: pages are written for the repository's view, and two things differ on the site.

Links to files outside docs/ (``../configs/x.yaml``), which the site does not contain: they lead to the repository's view of the
file if mkdocs.yml sets repo_url; without an address they become text that names the file.

Lists: Python-Markdown nests by four spaces, and starts a list only after an empty line.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

BRANCH = "main"
# A fenced block or a code span, which stay as they are; or a link, whose text may hold code spans.
_PARTS = re.compile(
    r"^```.*?^```$|(?<!!)\[(?P<text>(?:`[^`]*`|[^\[\]`])*)\]\((?P<target>\.\.?/[^)\s]+)\)|`[^`\n]+`", re.MULTILINE | re.DOTALL
)
_ITEM = re.compile(r"(?:[-*+]|\d+[.)]) +")
_BLOCKS = ("#", "|", "```", "<")  # what ends a list without an empty line


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """mkdocs calls this for every page before it renders it."""
    root = Path(config.config_file_path).parent
    folder = Path(config.docs_dir).relative_to(root) / Path(page.file.src_uri).parent
    return lists(rewrite(markdown, folder.as_posix(), config.repo_url, root))


def rewrite(markdown: str, folder: str, repo_url: str | None, root: Path) -> str:
    """The text of a page with its links out of docs/ rewritten.

    Args:
        markdown: text of the page.
        folder: of the page, from the repository's root, such as ``docs/results``.
        repo_url: address of the repository, or None.
        root: directory of the repository.

    Returns:
        The text; links that stay within docs/ are unchanged, and so are fenced blocks and code spans.
    """

    def replace(found: re.Match) -> str:
        if found["target"] is None:
            return found[0]
        target, hash_, anchor = found["target"].partition("#")
        path = posixpath.normpath(posixpath.join(folder, target))
        if path.startswith(("docs/", "../")):  # of the site, or outside of the repository: mkdocs reports the latter
            return found[0]
        if repo_url:
            view = "tree" if (root / path).is_dir() else "blob"
            return f"[{found['text']}]({repo_url.rstrip('/')}/{view}/{BRANCH}/{path}{hash_}{anchor})"
        named = path in found["text"] or "`" in found["text"] and posixpath.basename(path) in found["text"]
        return found["text"] if named else f"{found['text']} (`{path}`)"

    return _PARTS.sub(replace, markdown)


def lists(markdown: str) -> str:
    """The text of a page with its lists as Python-Markdown reads them; fenced blocks keep their lines."""
    lines: list[str] = []
    offsets: list[int] = []  # of each list that is open: the column where the text of its item begins
    fenced, blank, loose = False, True, False  # loose: there was an empty line since the last item began
    for line in markdown.split("\n"):
        text = line.lstrip(" ")
        indent, item = len(line) - len(text), None if fenced else _ITEM.match(text)
        if not text:
            lines.append("")
            blank, loose = True, True
            continue
        inside = bool(offsets)
        if item and text[0].isdigit() and not text.startswith("1") and not (blank or inside):
            item = None  # a line of a paragraph that begins with a number, as in CommonMark
        if not fenced and (item or blank or not indent and text.startswith(_BLOCKS)):
            while offsets and indent < offsets[-1]:
                offsets.pop()
        start = offsets[-1] if offsets else 0
        if item and not blank and (loose or not inside):
            lines.append("")
        lines.append(" " * 4 * len(offsets) + (line[start:] if indent >= start and not item else text))
        if item:
            offsets.append(indent + item.end())
        fenced ^= text.startswith("```")
        blank, loose = False, loose and not item
    return "\n".join(lines)
