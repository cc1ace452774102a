"""Jobs of the kernels: arrays of 64-bit words, laid out by Python and read by compiled code.

A float32 in a word is its bits. Addresses are those of arrays that the caller keeps alive.
"""

from __future__ import annotations

from enum import IntEnum, auto
from typing import Final

from shared.kernels.formats import FORMATS, PANEL, padded

BLOCK: Final = 2 * PANEL
"""Tokens per block of the KV cache, and keys per step of attention, which fixes its order of summation."""
PART: Final = 1024
"""Inputs of a panel that are unpacked at once."""
UNPACKED_FLOATS: Final = PART * PANEL
"""Size of a buffer for unpacked weights."""


class JobWord(IntEnum):
    """The first words of every job."""

    FUNCTION = 0
    """The function: a number of `FUNCTIONS`."""
    SEATS = auto()
    """Numbers given to threads."""
    ARRIVALS = auto()
    """Arrivals of threads at the ends of phases."""
    COUNTERS = auto()
    """Address of the phases' ticket counters."""
    TEAM_SIZE = auto()
    """Address of the function that returns the number of threads; 0 for a single thread."""


FUNCTIONS: Final = ("decode_bfloat16", "decode_float32", "attend_bfloat16", "attend_float32", "multiply_rows")
"""Names by number; the format is that of keys and values."""
ACTIVATIONS: Final = ("silu", "gelu", "gelu_tanh")
"""Names by number."""


class ProductWord(IntEnum):
    """Words of a product: y = x @ weights + bias."""

    FORM = 0
    WEIGHTS = auto()
    PANEL_BYTES = auto()
    DEPTH = auto()
    PAIRS = auto()
    """Pairs of panels."""
    BIAS = auto()
    """Address of the biases, float32; 0 for none."""


class LayerWord(IntEnum):
    """Words of a layer. A norm is the address of its gains, 0 for none, and its epsilon, the bits of a float32."""

    ATTENTION = 0
    """Address of the attention job."""
    ATTENTION_NORM = auto()
    ATTENTION_NORM_EPS = auto()
    ATTENTION_POST_NORM = auto()
    ATTENTION_POST_NORM_EPS = auto()
    MLP_NORM = auto()
    MLP_NORM_EPS = auto()
    MLP_POST_NORM = auto()
    MLP_POST_NORM_EPS = auto()
    Q_NORM = auto()
    Q_NORM_EPS = auto()
    K_NORM = auto()
    K_NORM_EPS = auto()
    NORMS_WHOLE_ROW = auto()
    COSINES = auto()
    """Address of (position, pair) float32; 0 for a layer without rotation."""
    SINES = auto()
    PAIRS = auto()
    ACTIVATION = auto()
    RESIDUAL_MULTIPLIER = auto()
    """Bits of a float32."""
    QKV = auto()
    """The product of q, k and v: `ProductWord`'s words."""
    OUT = QKV + len(ProductWord)  # type: ignore[operator]
    GATE_UP = OUT + len(ProductWord)
    """Its panels are a gate panel and an up panel in turn."""
    DOWN = GATE_UP + len(ProductWord)


LAYER_WORDS: Final = LayerWord.DOWN + len(ProductWord)


class PassWord(IntEnum):
    """Words of a pass. Buffers are float32, a row per token; strides are in floats."""

    TOKENS = len(JobWord)
    """Address of token ids (int64); 0 if `X` holds the input already."""
    ROWS = auto()
    POSITIONS = auto()
    """Address of the tokens' positions (int64)."""
    SPANS = auto()
    """Number of spans (`attention`)."""
    X = auto()
    NORMED = auto()
    """The last norm's output: at the end the final hidden states."""
    HIDDEN_SIZE = auto()
    HIDDEN_STRIDE = auto()
    QKV = auto()
    QKV_STRIDE = auto()
    ATTENDED = auto()
    ATTENDED_STRIDE = auto()
    PRODUCT = auto()
    PRODUCT_STRIDE = auto()
    GATED = auto()
    GATED_STRIDE = auto()
    LAYERS = auto()
    """Address of the layers, `LAYER_WORDS` each."""
    LAYER_COUNT = auto()
    NORM = auto()
    """The last norm: gains, 0 for none."""
    NORM_EPS = auto()
    EMBEDDING_MULTIPLIER = auto()
    WANTED = auto()
    """Address of the rows whose logits are wanted (int64)."""
    WANTED_COUNT = auto()
    CHOSEN = auto()
    """Buffer for the wanted rows of `NORMED`."""
    LOGITS = auto()
    LOGITS_STRIDE = auto()
    LOGIT_MULTIPLIER = auto()
    LOGIT_SOFTCAP = auto()
    SCRATCH = auto()
    """Buffers of the threads."""
    SCRATCH_BYTES = auto()
    EMBEDDING = auto()
    """The embedding as a product: token t is the weights of output t."""
    HEAD = EMBEDDING + len(ProductWord)  # type: ignore[operator]


PASS_WORDS: Final = PassWord.HEAD + len(ProductWord)
PHASES_PER_LAYER: Final = 9
PHASES: Final = 4
"""Phases outside the layers."""


class AttentionWord(IntEnum):
    """Words of an attention job. Strides are in floats; float32 values are passed as their bits."""

    QUERY = 0
    """Address of (token, kv head, group, head size) float32, each token's row contiguous."""
    KEY = auto()
    """Address of the new keys: (token, kv head, head size) float32."""
    VALUE = auto()
    OUT = auto()
    """Address of the output, like the queries."""
    QUERY_STRIDE = auto()
    KEY_STRIDE = auto()
    VALUE_STRIDE = auto()
    OUT_STRIDE = auto()
    KEYS = auto()
    """Address of the layer's keys."""
    VALUES = auto()
    SPANS = auto()
    """Address of the spans, `SpanWord`'s words each, int64."""
    TABLES = auto()
    """Address of the block tables, int32."""
    TABLE_WIDTH = auto()
    HEADS = auto()
    """KV heads."""
    GROUP = auto()
    """Query heads per kv head."""
    HEAD_SIZE = auto()
    SCALE = auto()
    SOFTCAP = auto()
    WINDOW = auto()
    CHUNK = auto()
    """A token attends within its chunk of this many tokens; 0 for none."""
    SINKS = auto()
    """Address of a float32 per query head: the score of one more key, whose value is zero; 0 for none."""
    MAX_ROWS = auto()
    """Most rows of a span: its tokens times the group."""


class SpanWord(IntEnum):
    """Words of a span: consecutive new tokens of one session."""

    TABLE = 0
    ROW = auto()
    """Row of the first token in the batch."""
    POSITION = auto()
    """Position of the first token in its session."""
    COUNT = auto()


def key_bytes(form: str, head_size: int) -> int:
    """Return the size of a block's keys of one head."""
    return 2 * FORMATS[form].panel_bytes(padded(head_size, PANEL))


def value_bytes(form: str, head_size: int) -> int:
    """Return the size of a block's values of one head."""
    return padded(head_size, 2 * PANEL) // PANEL * FORMATS[form].panel_bytes(BLOCK)


def scratch_floats(rows: int, head_size: int) -> int:
    """Return the size of a thread's scratch buffer for attention over spans of `rows` rows."""
    return UNPACKED_FLOATS + rows * (padded(head_size, PANEL) + padded(head_size, 2 * PANEL) + BLOCK + 2)
