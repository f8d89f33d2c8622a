"""Where files that a page's commands read come from."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from tests.docs.blocks import ROOT

# Files that a reader brings: texts of his own, and the models and texts of the results, whose pages say where they are from.
YOURS = {
    "text.txt",
    "other.txt",
    "mine.txt",
    "my.txt",
    "book.txt",
    "corpus.jsonl",
    "books/*.jsonl.xz",
    "novels.jsonl.xz",
    "plan.yaml",
    "chats.jsonl",
    "model.gguf",
    "wikitext2-valid.txt",
    "wikitext2-train.txt",
    "argparse.py",
    "SmolLM2-135M",
}


@dataclass
class Files:
    """What commands have written so far: paths, True where everything below them counts."""

    written: dict[str, bool] = field(default_factory=dict)
    elsewhere: dict[str, bool] = field(default_factory=dict)  # by commands of other pages

    def missing(self, path: str) -> bool:
        """True if nothing says where a file that is read comes from."""
        path = path.removeprefix("./")
        if "$" in path or path in YOURS or re.match(r"[A-Z][A-Z0-9_]*([-/.]|$)", path) or (ROOT / path).exists():
            return False
        for known in (self.written, self.elsewhere):
            if path in known or any(each.startswith(f"{path}/") for each in known):
                return False
            if any(below and path.startswith(f"{root}/") for root, below in known.items()):
                return False
        return True
