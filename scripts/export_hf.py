"""Writes a training checkpoint as a self-contained Hugging Face directory: `dmc export`, by its older name.

    python scripts/export_hf.py CHECKPOINT OUT

The program is `dmc.commands.export`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dmc.extras import needed_by_script  # noqa: E402

with needed_by_script("the export"):
    from dmc.commands.export import main

if __name__ == "__main__":
    sys.exit(main(program="export_hf"))
