"""Rotary settings that a Llama's config.json can have: fields of every kind, for heads of 8 dimensions."""

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.7],
    "long_factor": [1.0, 2.0, 4.0, 9.0],
    "original_max_position_embeddings": 48,
}


def fields(max_position_embeddings=64, **rope):
    return {"max_position_embeddings": max_position_embeddings, "rope_parameters": rope}


KINDS = {
    "default": fields(rope_type="default", rope_theta=300.0),
    "linear": fields(rope_type="linear", rope_theta=10000.0, factor=4.0),
    "llama3": fields(**LLAMA3),
    "yarn": fields(**YARN),
    "yarn with attention_factor": fields(**YARN, attention_factor=0.7),
    "yarn with mscale": fields(**YARN, mscale=0.7, mscale_all_dim=1.3),
    "yarn not truncated": fields(**YARN, truncate=False, beta_fast=4.0, beta_slow=0.5),
    "dynamic": fields(rope_type="dynamic", rope_theta=10000.0, factor=4.0),
    "longrope": fields(256, **LONGROPE),
    "longrope with factor": fields(256, **LONGROPE, factor=32.0),
    "longrope with attention_factor": fields(256, **LONGROPE, attention_factor=1.4),
    "proportional": fields(rope_type="proportional", rope_theta=100.0, partial_rotary_factor=0.5),
    "default with a partial factor": fields(rope_type="default", rope_theta=100.0, partial_rotary_factor=0.5),
}
SCALED = {name: KINDS[name] for name in ("yarn", "longrope with attention_factor")}

_LINEAR = {"rope_type": "linear", "factor": 2.0}
CONTRADICTING = {
    "both, with theta at the top": {"rope_parameters": YARN | {"rope_theta": 50.0}, "rope_scaling": _LINEAR, "rope_theta": 700.0},
    "both, with theta in one": {"rope_parameters": YARN | {"rope_theta": 50.0}, "rope_scaling": _LINEAR},
    "both, the older empty": {"rope_parameters": YARN, "rope_scaling": None, "rope_theta": 700.0},
    "two thetas": {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}, "rope_theta": 700.0},
    "theta at the top alone": {"rope_parameters": {"rope_type": "linear", "factor": 3.0}, "rope_theta": 700.0},
    "type and rope_type": {"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 2.0}, "rope_theta": 700.0},
    "type alone": {"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}},
    "original length at the top": {"rope_parameters": YARN | {"factor": 3.0}, "original_max_position_embeddings": 32},
    "a partial factor at the top": {
        "rope_parameters": {"rope_type": "proportional", "rope_theta": 90.0},
        "partial_rotary_factor": 0.5,
    },
}
