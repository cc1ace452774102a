"""What the gateway measures, under vLLM's names with our prefix.

Draft counters are those of `Result`: verified draft tokens and accepted ones; bonus tokens are in neither.
"""

from __future__ import annotations

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from services.gateway.core.completion import Tally

_LATENCY_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
_PER_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)


class Metrics:
    """The gateway's metrics in one registry; the label `model_name` is bound once."""

    def __init__(self, model: str, registry: CollectorRegistry = REGISTRY) -> None:
        self.registry = registry
        labels = ["model_name"]

        def counter(name: str, text: str) -> Counter:
            return Counter(f"wisp_{name}", text, labels, registry=registry).labels(model)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"wisp_{name}", text, labels, buckets=buckets, registry=registry).labels(model)

        self.running = Gauge("wisp_num_requests_running", "Texts being generated", labels, registry=registry).labels(
            model
        )
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of started texts")
        self.generation_tokens = counter("generation_tokens", "Output tokens, without end-of-text tokens")
        self.ttft_s = histogram("time_to_first_token_seconds", "From the request to its first token", _LATENCY_S)
        self.inter_token_s = histogram(
            "inter_token_latency_seconds", "Between tokens; those of one round share its time", _PER_TOKEN_S
        )
        self.e2e_s = histogram("e2e_request_latency_seconds", "From the request to the end of its text", _LATENCY_S)
        self.drafts = counter("spec_decode_num_drafts", "Rounds in which a draft was verified")
        self.draft_tokens = counter("spec_decode_num_draft_tokens", "Draft tokens that were verified")
        self.accepted_tokens = counter("spec_decode_num_accepted_tokens", "Draft tokens that were accepted")
        self._success = Counter(
            "wisp_request_success", "Texts that ended", [*labels, "finished_reason"], registry=registry
        )
        classed = [*labels, "service_class"]
        self._slo = Counter(
            "wisp_slo_requests",
            "Texts that ended, by whether they came to their own end within their SLO",
            [*classed, "attained"],
            registry=registry,
        )
        self._goodput = Counter(
            "wisp_goodput_tokens", "Output tokens of texts that attained their SLO", classed, registry=registry
        )
        self._refused = Counter(
            "wisp_requests_refused", "Texts that were refused with a 429", [*classed, "reason"], registry=registry
        )
        self.limited = Counter(
            "wisp_requests_limited", "Requests refused by a limit of their API key", ["limit"], registry=registry
        )
        self.unauthorized = Counter("wisp_requests_unauthorized", "Requests without a good API key", registry=registry)
        self._model = model

    def refused(self, service_class: str, reason: str, texts: int) -> None:
        """A request for so many texts was refused."""
        self._refused.labels(self._model, service_class, reason).inc(texts)

    def finished(self, reason: str, tally: Tally, total_s: float, service_class: str, attained: bool) -> None:
        """A text ended: `stop`, `length`, `abort` (nobody waits for it any more) or `error`."""
        self._success.labels(self._model, reason).inc()
        self._slo.labels(self._model, service_class, str(attained).lower()).inc()
        self._goodput.labels(self._model, service_class).inc(tally.tokens if attained else 0)
        self.drafts.inc(tally.drafts)
        self.draft_tokens.inc(tally.verified)
        self.accepted_tokens.inc(tally.accepted)
        if reason in ("stop", "length"):
            self.e2e_s.observe(total_s)
