"""Model families as data: what a config.json means, and which tensors a model of it has.

A family is one file of this folder with a `FAMILY`; it is found here by being there. Whoever needs the size of a model asks
for a `ModelShape`.
"""

from dmc.families.base import Family, ModelShape
from dmc.families.read import by_type, families, known, read_fields, read_shape, shape_of
from dmc.families.tensors import check_names, count, tensors

__all__ = [
    "Family",
    "ModelShape",
    "by_type",
    "check_names",
    "count",
    "families",
    "known",
    "read_fields",
    "read_shape",
    "shape_of",
    "tensors",
]
