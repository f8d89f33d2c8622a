"""The recipes that lose least for their bytes on a real model (docs/results/gear.md), by name."""

from __future__ import annotations

from dmc.cache.codecs.gear import GearCodec


class _Preset(GearCodec):
    """`GearCodec` with defaults of its own; every setting can still be changed.

    Pages are longer than its own, which costs the fewest bits a stored entry; below some thousand tokens a head
    ``page_size=32`` holds less in all, since fewer entries wait for a full page.
    """

    page_size = 64
    defaults: dict[str, object]

    def __init__(self, **changes: object) -> None:
        super().__init__(**(self.defaults | changes))

    @classmethod
    def settings(cls) -> list[str]:
        """See `Codec.settings`."""
        return GearCodec.settings()


class Gear4Bit(_Preset):
    """For a KL to the uncompressed model of about 0.002 a token."""

    name = "gear-4bit"
    defaults = {"bits": 4}


class Gear3Bit(_Preset):
    """For a KL of about 0.01 a token."""

    name = "gear-3bit"
    defaults = {"bits": 3}


class Gear2Bit(_Preset):
    """For a KL of about 0.05 a token."""

    name = "gear-2bit"
    defaults = {"bits": 2}


PRESETS = (Gear4Bit, Gear3Bit, Gear2Bit)
