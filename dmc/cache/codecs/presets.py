"""Codecs with settings of their own, by name: GEAR's published recipe, and TCQ with the bits that lose least."""

from __future__ import annotations

from typing import ClassVar

from dmc.cache.codecs.base import Codec
from dmc.cache.codecs.gear import GearCodec
from dmc.cache.codecs.tcq import TcqCodec


class _Preset(Codec):
    """A codec with its own defaults; every setting can be changed."""

    defaults: ClassVar[dict[str, object]]
    of: ClassVar[type[Codec]]

    def __init__(self, **changes: object) -> None:
        super().__init__(**(self.defaults | changes))

    @classmethod
    def settings(cls) -> list[str]:
        """See `Codec.settings`."""
        return cls.of.settings()


class _Gear(_Preset, GearCodec):
    """GEAR as published: rank 4, 2 % outliers, and the paper's backbone for these bits."""

    of = GearCodec


class Gear4Bit(_Gear):
    """KCVT backbone."""

    name = "gear-4bit"
    defaults = {"bits": 4}


class Gear2Bit(_Gear):
    """KIVI backbone."""

    name = "gear-2bit"
    defaults = {"bits": 2}


class _Tcq(_Preset, TcqCodec):
    """TCQ in pages longer than its default, which takes the fewest bits per stored entry.

    Below some thousand tokens per head ``page_size=32`` takes fewer bytes in total, since fewer entries wait for a full page.
    """

    of = TcqCodec
    page_size = 64


class Tcq4Bit(_Tcq):
    """For a KL to the uncompressed model of about 0.002 nats/token."""

    name = "tcq-4bit"
    defaults = {"bits": 4}


class Tcq3Bit(_Tcq):
    """For a KL of about 0.01 nats/token."""

    name = "tcq-3bit"
    defaults = {"bits": 3}


class Tcq2Bit(_Tcq):
    """For a KL of about 0.05 nats/token."""

    name = "tcq-2bit"
    defaults = {"bits": 2}
