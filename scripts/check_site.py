"""Builds the documentation site, and checks every link of the built pages: files, anchors, images.

    python scripts/check_site.py                  mkdocs build --strict into build/site, then the links
    python scripts/check_site.py --built DIR      the links of a site that is built already

Links to other machines are counted, not followed. Exits with 1 if something is wrong, one line for each.
Needs the extra `docs`; DMC_DOCS_PYTHON names the Python of another environment that has it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]


class Page(HTMLParser):
    """Ids, links and images of one page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: Counter[str] = Counter()
        self.links: list[str] = []
        self.bare: list[str] = []  # images without a description
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """See HTMLParser."""
        given = dict(attributes)
        self.ids.update(value for name, value in attributes if value and (name == "id" or (tag, name) == ("a", "name")))
        self.links += [value for name, value in attributes if value and name in ("href", "src")]
        if tag == "img" and not given.get("alt"):
            self.bare.append(given.get("src") or "")


def main() -> int:
    """Build, check, and print what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--built", metavar="DIR", help="a built site; nothing is built")
    options = parser.parse_args()
    site = Path(options.built) if options.built else ROOT / "build" / "site"
    if not options.built and (code := build(site).returncode):
        return code
    found, links, away = problems(site)
    print("\n".join([*found, f"{len(found)} problems; {links} links within the site, {away} to other machines"]))
    return 1 if found else 0


def build(site: Path) -> subprocess.CompletedProcess:
    """Run mkdocs; its output goes where ours goes."""
    python = os.environ.get("DMC_DOCS_PYTHON", sys.executable)
    command = [python, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})


def problems(site: Path) -> tuple[list[str], int, int]:
    """One line for each problem, the number of links within the site, and that of links to other machines.

    Raises:
        ValueError: if there is no page.
    """
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}
    if not pages:
        raise ValueError(f"{site} has no pages: build it with mkdocs build")
    found, links, away = [], 0, 0
    for path, page in pages.items():
        name = path.relative_to(site)
        found += [f"{name}: the id {each} is there {count} times" for each, count in page.ids.items() if count > 1]
        found += [f"{name}: the image {source} has no description" for source in page.bare]
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                away += parts.scheme in ("http", "https")
                continue
            links += 1
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                found.append(f"{name}: {link} leads nowhere")
            elif parts.fragment and (there := pages.get(target)) is not None and unquote(parts.fragment) not in there.ids:
                found.append(f"{name}: {link}: that page has no such heading")
    return found, links, away


if __name__ == "__main__":
    sys.exit(main())
