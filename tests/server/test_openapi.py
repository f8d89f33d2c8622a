"""Requests that schemathesis makes from the server's own OpenAPI description, valid and not: every answer is one that the
description names, in the form that it names, and never a server error."""

import contextlib
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable

from tests.server.helpers import model_directory, serving

schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis (pip install -e '.[dev]')")
POSITIVE, NEGATIVE = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
GENERATING = ("POST /v1/completions", "POST /v1/chat/completions", "POST /try")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    directory = model_directory(tmp_path_factory.mktemp("served") / "model")
    with serving(directory, settings={"max_body": 100_000, "body_timeout": 5.0, "default_max_tokens": 5}) as running:
        yield running


def check(server, mode, examples):
    """Status codes by operation."""
    seen = {}
    for operation in schemathesis.openapi.from_url(f"{server.url}/openapi.json").get_all_operations():
        operation = operation.ok()
        seen[operation.label] = Counter()
        # without parameters or a body there is nothing to get wrong
        expected = (Unsatisfiable,) if mode is NEGATIVE and operation.label not in GENERATING else ()
        with contextlib.suppress(*expected):
            check_operation(operation, mode, examples, seen[operation.label])
    server.wait_idle()
    return seen


def possible(body):
    """What else the server cannot have or the description cannot say, or what would take long; else few requests get so far."""
    said = {name: min(body[name], 3) for name in ("max_tokens", "max_completion_tokens") if body.get(name)}
    said |= {"model": "tiny"} if "model" in body else {}
    seed = body.get("seed") or 0  # bounds are floats where examples are made
    said |= {"seed": 2**63 - 1} if isinstance(seed, int | float) and seed >= 2**63 else {}
    if isinstance(prompt := body.get("prompt"), list) and prompt:
        said["prompt"] = [one if isinstance(one, str | list) else int(one) % 97 for one in prompt[:3]]
        said["prompt"] = [[int(x) % 97 for x in one] or [5] if isinstance(one, list) else one for one in said["prompt"]]
        said["prompt"] = ["a" if one == "" else one for one in said["prompt"]]
    elif "prompt" in body:
        said["prompt"] = prompt or "a"
    return said | ({"stream_options": None} if "stream_options" in body and not body.get("stream") else {})


def check_operation(operation, mode, examples, codes):
    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(operation.as_strategy(generation_mode=mode))
    def run(case):
        if mode is POSITIVE and isinstance(case.body, dict):
            case.body |= possible(case.body)
        answer = case.call(timeout=60)
        assert mode is NEGATIVE or answer.status_code != 422, (case.body, answer.text)
        codes[answer.status_code] += 1
        # what the description cannot say (positions, chat templates, token ids) is refused with 400, so valid data can be
        case.validate_response(answer, excluded_checks=[schemathesis.checks.positive_data_acceptance])

    run()


def verdict(seen, mode):
    assert set(GENERATING) < set(seen) and len(seen) == 7
    for label in GENERATING:
        assert sum(seen[label].values()) > 0
        if mode is NEGATIVE:
            assert set(seen[label]) <= {400, 404, 422}, (label, seen[label])
        else:
            assert seen[label][200] > 0 and set(seen[label]) <= {200, 400}, (label, seen[label])


@pytest.mark.parametrize("mode", ["valid", "invalid"])
def test_described(server, mode):
    mode = POSITIVE if mode == "valid" else NEGATIVE
    verdict(check(server, mode, 15), mode)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["valid", "invalid"])
def test_described_at_length(server, mode):
    mode = POSITIVE if mode == "valid" else NEGATIVE
    seen = check(server, mode, 800)
    verdict(seen, mode)
    print(mode, seen)
