"""OpenAI's HTTP interface over the engine. Needs ``pip install -e '.[serve]'`` in the checkout."""

from dmc.server.app import create_app
from dmc.server.settings import Settings

__all__ = ["Settings", "create_app"]
