"""Hook of mkdocs: links of pages to files outside docs/ (``../configs/x.yaml``), which the site does not contain.

In the repository such a link leads to the file. On the site it leads to the repository's view of the file if mkdocs.yml
sets repo_url; without an address it becomes text that names the file.
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
    r"^```.*?^```$|(?<!!)\[(?P<text>(?:`[^`]*`|[^\[\]`])*)\]\((?P<target>\.\.?/[^)\s]+)\)|`[^`\n]+`", re.MULTILINE | re.DOTALL,
)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """mkdocs calls this for every page before it renders it."""
    root = Path(config.config_file_path).parent
    folder = Path(config.docs_dir).relative_to(root) / Path(page.file.src_uri).parent
    return rewrite(markdown, folder.as_posix(), config.repo_url, root)


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
