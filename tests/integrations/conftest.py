"""The plugin is a package of its own, which need not be installed for its tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "integrations" / "vllm"))
