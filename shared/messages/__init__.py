"""Messages between the services: small typed records, msgpack maps on the wire. Pure: no I/O, no clock.

A map carries its type name (`t`) and the schema version (`v`) beside the record's own fields. Unknown fields
are ignored, so that services of neighbouring versions work side by side during a rolling update; a missing or ill-typed
field is a `MessageError`. Times are durations in milliseconds, left or elapsed, never a point on another process's
clock.

Token positions count from the first token of the prompt. `base_len` is always the number of committed tokens (prompt
included) that a round builds on.
"""

from shared.messages.fields import (
    DEFAULT_CLASS,
    FARTHEST_MS,
    LONGEST_MS,
    MOST,
    SHORTEST_MS,
    Finish,
    HiddenFormat,
    Message,
    Name,
    Promised,
    Record,
    Sampling,
    Slo,
    Status,
)
from shared.messages.pool import (
    DRAFTER_BEAT_S,
    SILENT_MS,
    BatchShape,
    ClassLoad,
    CostModel,
    DrafterHeartbeat,
    Heartbeat,
    Load,
    Measurement,
    Residency,
    Sample,
)
from shared.messages.rounds import (
    Batch,
    Cancel,
    Ended,
    Failure,
    Generate,
    Halt,
    HiddenStates,
    Job,
    LeftOut,
    Release,
    Result,
    RoundFields,
    RunGrant,
    Verify,
)
from shared.messages.wire import MESSAGES, SCHEMA_VERSION, decode, encode

__all__ = [
    "DEFAULT_CLASS",
    "DRAFTER_BEAT_S",
    "FARTHEST_MS",
    "LONGEST_MS",
    "MESSAGES",
    "MOST",
    "SCHEMA_VERSION",
    "SHORTEST_MS",
    "SILENT_MS",
    "Batch",
    "BatchShape",
    "Cancel",
    "ClassLoad",
    "CostModel",
    "DrafterHeartbeat",
    "Ended",
    "Failure",
    "Finish",
    "Generate",
    "Halt",
    "Heartbeat",
    "HiddenFormat",
    "HiddenStates",
    "Job",
    "LeftOut",
    "Load",
    "Measurement",
    "Message",
    "Name",
    "Promised",
    "Record",
    "Release",
    "Residency",
    "Result",
    "RoundFields",
    "RunGrant",
    "Sample",
    "Sampling",
    "Slo",
    "Status",
    "Verify",
    "decode",
    "encode",
]
