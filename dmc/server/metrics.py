"""/metrics for Prometheus: vLLM's names after the prefix, and what only a compressed cache has."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from dmc.engine.sequence import Sequence
from dmc.engine.service import Service

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)


class Metrics:
    """Counters and histograms, fed after each step, and gauges, read when asked for.

    Args:
        service: whose engine is measured.
        model: its name, a label of every metric.
    """

    def __init__(self, service: Service, model: str) -> None:
        self.registry, self._labels = CollectorRegistry(), {"model_name": model}

        def made(kind: type, name: str, text: str, *more: str, **options: object) -> Counter | Histogram:
            metric = kind(f"dmc:{name}", text, ["model_name", *more], registry=self.registry, **options)
            return metric if more else metric.labels(model)

        self.prompt_tokens = made(Counter, "prompt_tokens", "Prefilled prompt tokens.")
        self.generation_tokens = made(Counter, "generation_tokens", "Generated tokens.")
        self.preemptions = made(Counter, "num_preemptions", "Sequences swapped out to host memory.")
        self.success = made(Counter, "request_success", "Sequences that ended.", "finished_reason")
        self.first = made(Histogram, "time_to_first_token_seconds", "Time from arrival to the first token.", buckets=_SECONDS)
        self.between = made(Histogram, "inter_token_latency_seconds", "Mean time between tokens of a sequence.", buckets=_SECONDS)
        self.whole = made(Histogram, "e2e_request_latency_seconds", "Time from arrival to the last token.", buckets=_SECONDS)
        self.queue = made(Histogram, "request_queue_time_seconds", "Time from arrival to admission.", buckets=_SECONDS)
        self.prompt = made(Histogram, "request_prompt_tokens", "Prompt tokens of a sequence.", buckets=_TOKENS)
        self.generated = made(Histogram, "request_generation_tokens", "Generated tokens of a sequence.", buckets=_TOKENS)
        self._preempted = 0
        self.registry.register(_Gauges(service, model))

    def step(self, advanced: list[Sequence], preemptions: int) -> None:
        """Counts what a step did; ``preemptions`` since the start."""
        self.generation_tokens.inc(sum(bool(sequence.tokens) for sequence in advanced))
        self.preemptions.inc(preemptions - self._preempted)
        self._preempted = preemptions
        for sequence in advanced:
            if len(sequence.tokens) == 1:
                self.prompt_tokens.inc(len(sequence.prompt))
                self.first.observe(sequence.times["first"] - sequence.times["added"])
            if sequence.finish_reason:
                self._ended(sequence)

    def cancelled(self, sequences: list[Sequence]) -> None:
        """Counts sequences whose client went away."""
        self.success.labels(finished_reason="abort", **self._labels).inc(len(sequences))

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def _ended(self, sequence: Sequence) -> None:
        times, reason = sequence.times, {"eos": "stop"}.get(sequence.finish_reason, sequence.finish_reason)
        self.success.labels(finished_reason=reason, **self._labels).inc()
        self.whole.observe(times["finished"] - times["added"])
        if "admitted" in times:
            self.queue.observe(times["admitted"] - times["added"])
        self.prompt.observe(len(sequence.prompt))
        self.generated.observe(len(sequence.tokens))
        if len(sequence.tokens) > 1:
            self.between.observe((times["finished"] - times["first"]) / (len(sequence.tokens) - 1))


class _Gauges:
    """Read from the engine when Prometheus asks; what is read are plain numbers, whatever the engine does meanwhile."""

    def __init__(self, service: Service, model: str) -> None:
        self.service, self.model = service, model

    def collect(self) -> Iterator[Metric]:
        engine, cache = self.service.llm.engine, self.service.llm.cache
        scheduler = engine.scheduler
        running, used, pages = list(scheduler.running), cache.used_pages, cache.pages
        tokens = sum(sequence.position for sequence in running)
        held, dense = used * cache.page_bytes, cache.dense_bytes(tokens)
        keys, values = cache.codec_error
        for name, text, value in (
            ("num_requests_running", "Sequences that decode or prefill.", len(running) + len(scheduler.prefilling)),
            ("num_requests_waiting", "Sequences that wait to be admitted.", self.service.waiting),
            ("num_requests_swapped", "Sequences in host memory.", len(scheduler.swapped)),
            ("kv_cache_usage_perc", "Pages in use / pages of the pool (now, if the pool grows).", used / pages),
            ("kv_held_bytes", "Bytes of pages in use, shared ones counted once.", held),
            ("kv_dense_bytes", "Bytes of an uncompressed bf16 cache of the running sequences.", dense),
            ("kv_byte_ratio", "kv_dense_bytes / kv_held_bytes; 0 while nothing runs.", dense / held if held else 0.0),
            (
                "kv_prompt_bytes",
                "Bytes of full-precision entries of prompts that are prefilling, outside the pool.",
                engine.prompt_bytes,
            ),
            ("compression_ratio", "Tokens / entries of recent sequences, over all layers and heads.", engine.predictor.cr),
            ("codec_error_keys", "Relative error of encoded keys, on a sample of pages.", keys),
            ("codec_error_values", "Relative error of encoded values, on a sample of pages.", values),
            ("engine_alive", "1; 0 after the engine has failed.", float(self.service.death is None)),
        ):
            yield self._gauge(name, text, [], [([], value)])
        heads = [
            ([str(layer), str(head)], ratio)
            for layer, row in enumerate(engine.predictor.cr_per_head)
            for head, ratio in enumerate(row)
        ]
        yield self._gauge("head_compression_ratio", "Tokens / entries of recent sequences, per head.", ["layer", "head"], heads)

    def _gauge(self, name: str, text: str, labels: list[str], values: list[tuple[list[str], float]]) -> GaugeMetricFamily:
        gauge = GaugeMetricFamily(f"dmc:{name}", text, labels=["model_name", *labels])
        for more, value in values:
            gauge.add_metric([self.model, *more], value)
        return gauge
