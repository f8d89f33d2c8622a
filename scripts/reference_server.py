"""Pages of `scripts/make_reference.py` for the server: its HTTP interface and its metrics, from its own descriptions."""

from __future__ import annotations

import functools
import json
from types import SimpleNamespace

from fastapi import FastAPI
from prometheus_client.metrics import MetricWrapperBase

from dmc.engine import SamplingParams
from dmc.server import app, page
from dmc.server.metrics import Metrics
from scripts.reference_text import attributes, escaped, table

MEANINGS = {
    "model": "name of the model, as `GET /v1/models` gives it",
    "prompt": "text, a list of texts, a list of token ids, or a list of such lists",
    "messages": "the conversation: objects with `role` and `content`; see [serving](../serving.md#the-server)",
    "max_tokens": "generated at most",
    "max_completion_tokens": "the same; it wins over `max_tokens`",
    "logprobs": "number of most likely tokens to report with each token (chat: true or false, see `top_logprobs`)",
    "top_logprobs": "number of most likely tokens to report with each token; needs `logprobs`",
    "stream": "answer token by token, as events",
    "stream_options": "`include_usage`: the stream ends with an event that has the token counts",
}
"""Fields that `SamplingParams` does not describe."""
IGNORED = {
    "user": "accepted, without effect",
    "safety_identifier": "accepted, without effect",
    "prompt_cache_key": "accepted, without effect",
    "parallel_tool_calls": "accepted, without effect: there are no tools",
}


@functools.cache
def described() -> dict:
    """The server's OpenAPI description."""
    api = FastAPI(title="dmc")
    app._routes(api, None)
    page.install(api, None, "")
    return api.openapi()


def http() -> str:
    """Routes with their fields and status codes."""
    paths, schemas = described()["paths"], described()["components"]["schemas"]
    parts = [
        "The server's own OpenAPI description, `GET /openapi.json`, in tables. What each status means here is in "
        "[serving](../serving.md#the-server). Three rules hold for every object of a request: null means that a field is "
        "not given; an unknown field is an error (422); a parameter of OpenAI that is not served is accepted only with the "
        "value that asks for nothing.",
        'Each error has the body `{"error": {"message", "type", "param", "code"}}`.',
    ]
    rows = [
        (f"`{method.upper()} {path}`", escaped(route.get("description", "")), ", ".join(sorted(route["responses"])))
        for path, methods in paths.items()
        for method, route in methods.items()
    ]
    parts.append(table(("route", "what it does", "status codes"), rows))
    for path, methods in paths.items():
        for method, route in methods.items():
            if "requestBody" in route:
                body = route["requestBody"]["content"]["application/json"]["schema"]["$ref"]
                parts += [f"## {method.upper()} {path}", _fields(schemas[body.rpartition("/")[2]])]
    return "\n\n".join(parts)


def _fields(schema: dict) -> str:
    known, required = attributes(SamplingParams) | MEANINGS | IGNORED, schema.get("required", ())
    rows = []
    for name, field in schema["properties"].items():
        kind, only = _kind(field), " or ".join(f"`{_json(value)}`" for value in _only(field))
        default = "required" if name in required else f"`{_json(field.get('default'))}`"
        meaning = f"not served: only {only} is accepted" if only else known.get(name)
        if meaning is None:
            raise KeyError(f"the field {name} of a request has no meaning in scripts/reference_server.py")
        rows.append((f"`{name}`", kind, default, escaped(meaning)))
    return table(("field", "type", "default", "meaning"), rows)


def _only(field: dict) -> list:
    """The few values that a field may have because nothing else is served; [] if it is served."""
    options = [each for each in field.get("anyOf", [field]) if each.get("type") != "null"]
    (one,) = options if len(options) == 1 else ({},)
    items = one.get("items", {})
    if one.get("maxItems") == 0 or one.get("maxProperties") == 0:
        return [[] if one["type"] == "array" else {}]
    if "const" in items:
        return [[items["const"]]]
    if one.get("$ref", "").endswith("/TextFormat"):
        return [{"type": "text"}]
    return [one["const"]] if "const" in one else one.get("enum", [])


def _kind(field: dict) -> str:
    """A type in words, with its range."""
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_kind(each) for each in field["anyOf"] if each.get("type") != "null"))
    if "oneOf" in field:
        return "object"
    if "$ref" in field:
        return "object"
    kind = field.get("type", "object" if "properties" in field else "value")
    if kind == "array":
        kind = f"list of {_kind(field.get('items', {}))}"
        return kind + (f", {field['maxItems']} at most" if field.get("maxItems") else "")
    if kind == "object" and "additionalProperties" in field:
        return f"object of {_kind(field['additionalProperties'])}" if field["additionalProperties"] else "object"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {field[name]:g}" for name, sign in signs.items() if name in field]
    return " ".join([kind, *([f"({', '.join(limits)})"] if limits else [])])


def _json(value: object) -> str:
    return json.dumps(value)


def metrics() -> str:
    """Every metric of /metrics."""
    cache = SimpleNamespace(used_pages=0, pages=1, page_bytes=1, dense_bytes=lambda tokens: 0, codec_error=(0.0, 0.0))
    scheduler = SimpleNamespace(running=[], prefilling=[], swapped=[])
    predictor = SimpleNamespace(cr=1.0, cr_per_head=[[1.0]])
    engine = SimpleNamespace(scheduler=scheduler, prompt_bytes=0, predictor=predictor)
    made = Metrics(SimpleNamespace(llm=SimpleNamespace(engine=engine, cache=cache), waiting=0, death=None), "model")
    labels = {
        collector._name: collector._labelnames
        for collector in made.registry._collector_to_names
        if isinstance(collector, MetricWrapperBase)
    }
    rows = []
    for family in made.registry.collect():
        own = labels.get(family.name) or tuple(family.samples[0].labels)
        suffix = {"counter": "_total", "histogram": "_bucket, _sum, _count"}.get(family.type, "")
        name = f"`{family.name}{suffix}`" if ", " not in suffix else f"`{family.name}` (`{suffix.replace(', ', '`, `')}`)"
        rows.append((name, family.type, ", ".join(f"`{label}`" for label in own), escaped(family.documentation)))
    return "\n\n".join(
        [
            "`GET /metrics`, in Prometheus' text format. Names after the prefix `dmc:` are vLLM's where vLLM has such a metric. "
            "A counter and a histogram also have a sample `_created`. [How to scrape them](../containers.md).",
            table(("name", "type", "labels", "meaning"), rows),
        ]
    )
