"""What a verifier counts."""

from prometheus_client import Counter, Gauge, Histogram

BATCHES = Counter("wisp_verifier_batches", "Batches verified")
BATCH_JOBS = Histogram("wisp_verifier_batch_jobs", "Jobs per batch", buckets=(1, 2, 4, 8, 16, 32, 64, 128))
BATCH_TIME = Histogram(
    "wisp_verifier_batch_seconds", "Time of a batch in the model", buckets=(0.01, 0.03, 0.1, 0.2, 0.4, 0.8, 2, 5)
)
NEW_TOKENS = Counter("wisp_verifier_new_tokens", "Tokens computed: drafts, last tokens and prompts")
HIDDEN_BYTES = Counter("wisp_verifier_hidden_bytes", "Hidden states sent to drafters, in bytes")
HANDOFF_SAVED = Counter("wisp_verifier_handoff_saved_tokens", "Tokens whose K/V were left to others in Redis")
HANDOFF_LOADED = Counter("wisp_verifier_handoff_loaded_tokens", "Tokens whose K/V were loaded from Redis")
JOBS_REFUSED = Counter("wisp_verifier_jobs_refused", "Jobs that could not be verified", ["code"])
CACHE_USAGE = Gauge("wisp_kv_cache_usage_perc", "Share of the K/V budget that sessions hold, 0 to 1")
