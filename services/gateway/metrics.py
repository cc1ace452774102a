"""The gateway's metrics, under vLLM's names with our prefix.

Draft counters count the verified and the accepted draft tokens of `Result`; bonus tokens are in neither.
"""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from services.gateway.core.completion import CompletionTally

_LATENCY_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
_PER_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
_MODEL = ["model_name"]
_CLASS = ["model_name", "service_class"]

RUNNING = Gauge("wisp_num_requests_running", "Running completions", _MODEL)
PROMPT_TOKENS = Counter("wisp_prompt_tokens", "Prompt tokens of started completions", _MODEL)
GENERATION_TOKENS = Counter("wisp_generation_tokens", "Output tokens, without end-of-text tokens", _MODEL)
TTFT = Histogram(
    "wisp_time_to_first_token_seconds", "Time from the request to its first token", _MODEL, buckets=_LATENCY_S
)
INTER_TOKEN = Histogram(
    "wisp_inter_token_latency_seconds",
    "Time between tokens; the tokens of one round share its time",
    _MODEL,
    buckets=_PER_TOKEN_S,
)
E2E = Histogram(
    "wisp_e2e_request_latency_seconds",
    "Time from the request to the end of its completion",
    _MODEL,
    buckets=_LATENCY_S,
)
DRAFTS = Counter("wisp_spec_decode_num_drafts", "Rounds with at least one verified draft token", _MODEL)
DRAFT_TOKENS = Counter("wisp_spec_decode_num_draft_tokens", "Verified draft tokens", _MODEL)
ACCEPTED_TOKENS = Counter("wisp_spec_decode_num_accepted_tokens", "Accepted draft tokens", _MODEL)
ACCEPTED_BY_POSITION = Counter(
    "wisp_spec_decode_num_accepted_tokens_per_pos",
    "Accepted draft tokens by their position in the draft, from 0",
    [*_MODEL, "position"],
)
SUCCESS = Counter("wisp_request_success", "Ended completions", [*_MODEL, "finished_reason"])
SLO_REQUESTS = Counter(
    "wisp_slo_requests", "Ended completions, by whether they completed within their SLO", [*_CLASS, "attained"]
)
GOODPUT_TOKENS = Counter("wisp_goodput_tokens", "Output tokens of completions that attained their SLO", _CLASS)
REFUSED = Counter("wisp_requests_refused", "Completions refused with a 429", [*_CLASS, "reason"])
LIMITED = Counter("wisp_requests_limited", "Requests refused by a limit of their API key", ["limit"])
VERIFIERS = Gauge(
    "wisp_gateway_verifiers",
    "Usable verifiers of the model, by arithmetic; several arithmetics are a mixed fleet",
    ["arithmetic"],
)
UNAUTHORIZED = Counter("wisp_requests_unauthorized", "Requests without a valid API key")


class ModelMetrics:
    """The metrics of one served model. Those without further labels are exported from the start, as 0."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self.running = RUNNING.labels(model_name)
        self.prompt_tokens = PROMPT_TOKENS.labels(model_name)
        self.generation_tokens = GENERATION_TOKENS.labels(model_name)
        self.ttft_s = TTFT.labels(model_name)
        self.inter_token_s = INTER_TOKEN.labels(model_name)
        self.e2e_s = E2E.labels(model_name)
        self.drafts = DRAFTS.labels(model_name)
        self.draft_tokens = DRAFT_TOKENS.labels(model_name)
        self.accepted_tokens = ACCEPTED_TOKENS.labels(model_name)

    def refused(self, service_class: str, reason: str, completions: int) -> None:
        """Count a refused request."""
        REFUSED.labels(self._model_name, service_class, reason).inc(completions)

    def finished(self, reason: str, tally: CompletionTally, total_s: float, service_class: str, attained: bool) -> None:
        """Count an ended completion. Reasons: `stop`, `length`, `abort` (the client went away), `error`."""
        SUCCESS.labels(self._model_name, reason).inc()
        SLO_REQUESTS.labels(self._model_name, service_class, str(attained).lower()).inc()
        GOODPUT_TOKENS.labels(self._model_name, service_class).inc(tally.tokens if attained else 0)
        self.drafts.inc(tally.drafts)
        self.draft_tokens.inc(tally.verified)
        self.accepted_tokens.inc(tally.accepted)
        for accepted, rounds in tally.accepted_in_round.items():
            for position in range(accepted):
                ACCEPTED_BY_POSITION.labels(self._model_name, position).inc(rounds)
        if reason in ("stop", "length"):
            self.e2e_s.observe(total_s)
