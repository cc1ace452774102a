"""Metrics of the verifier."""

from prometheus_client import Counter, Gauge, Histogram

from shared.messages import Result, Status

BATCHES = Counter(
    "wisp_verifier_batches", "Steps through the model: a batch, a token of each session in a run, or both"
)
BATCH_JOBS = Histogram("wisp_verifier_batch_jobs", "Sessions per step", buckets=(1, 2, 4, 8, 16, 32, 64, 128))
BATCH_TIME = Histogram(
    "wisp_verifier_batch_seconds", "Time of a step in the model", buckets=(0.01, 0.03, 0.1, 0.2, 0.4, 0.8, 2, 5)
)
NEW_TOKENS = Counter("wisp_verifier_new_tokens", "Tokens computed: drafts, last tokens and prompts")
HIDDEN_BYTES = Counter("wisp_verifier_hidden_bytes", "Hidden states sent to drafters, in bytes")
HANDOFF_SAVED = Counter("wisp_verifier_handoff_saved_tokens", "Tokens whose KV was saved in Redis for other verifiers")
HANDOFF_LOADED = Counter("wisp_verifier_handoff_loaded_tokens", "Tokens whose KV was loaded from Redis")
JOBS_REFUSED = Counter("wisp_verifier_jobs_refused", "Jobs that could not be verified", ["code"])
COMMITS = Counter(
    "wisp_verifier_commits",
    "Answers of Redis to commits: committed (again, if the round was sent twice), conflict (the session has other "
    "tokens), cancelled, gone",
    ["outcome"],
)
CACHE_USAGE = Gauge("wisp_kv_cache_usage_perc", "Share of the KV budget that sessions hold, 0 to 1")
INTEGRITY_ERRORS = Counter(
    "wisp_verifier_integrity_errors", "Checks that found the accounting of the KV cache wrong and dropped the cache"
)
TOKENS = Counter(
    "wisp_verifier_tokens",
    "Committed tokens by origin: accepted draft tokens (draft) and the target's own token of a round (bonus); accepted "
    "copies (copy) and the target's own token of a step (run) in a run",
    ["origin"],
)


def count_tokens(result: Result) -> None:
    """Count the tokens that a result commits. A repeated answer, for which nothing was computed, commits none."""
    if not result.new_tokens:
        return
    if result.status is Status.COMMITTED and result.run:
        TOKENS.labels("copy").inc(len(result.copied))
        TOKENS.labels("run").inc(len(result.tokens) - len(result.copied))
    elif result.status is Status.COMMITTED:
        TOKENS.labels("draft").inc(result.accepted)
        TOKENS.labels("bonus").inc(len(result.tokens) - result.accepted)
