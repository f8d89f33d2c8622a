"""OpenAI's HTTP interface over the engine. Needs ``pip install dmc[serve]``."""

from dmc.server.app import create_app
from dmc.server.settings import Settings

__all__ = ["Settings", "create_app"]
