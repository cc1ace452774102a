"""The forward pass of a decoder as one compiled function, from token ids to logits.

`shared.kernels.decoder` describes a pass, its layers and their products in arrays of 64-bit words (`layout`). All
activations are float32. Sums have the order that the source gives them, so the bits of a row depend on the row's
session alone.
"""

# numba's annotations cover neither its intrinsics nor the types in compiled code.
# mypy: disable-error-code="no-untyped-call, arg-type, call-arg, attr-defined, var-annotated, no-any-return"

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from shared.kernels.formats import PANEL
from shared.kernels.layout import LAYER_WORDS, AttentionWord, LayerWord, PassWord, ProductWord
from shared.kernels.source.attention import ATTEND_BFLOAT16, ATTEND_FLOAT32, STORE_BFLOAT16, STORE_FLOAT32
from shared.kernels.source.functions import gelu, gelu_tanh, silu, tanh
from shared.kernels.source.products import add_product, clear, weight
from shared.kernels.source.threads import draw, finish, take_seat, team_size
from shared.kernels.source.vectors import (
    LANES,
    fma,
    from_bits,
    get_float,
    get_word,
    kernel,
    lane_sum,
    load_vector,
    put_float,
    vector_fma,
    zeros,
)

# numba takes plain integers as constants.
_HEADS, _GROUP, _HEAD_SIZE = (int(word) for word in (AttentionWord.HEADS, AttentionWord.GROUP, AttentionWord.HEAD_SIZE))
_L = {word.name: int(word) for word in LayerWord}
_FORM, _WEIGHTS, _PANEL_BYTES, _DEPTH, _PAIRS, _BIAS = map(int, ProductWord)
_ACTIVATION, _ATTENTION, _QKV, _OUT, _GATE_UP, _DOWN = (
    _L[name] for name in ("ACTIVATION", "ATTENTION", "QKV", "OUT", "GATE_UP", "DOWN")
)
_COSINES, _SINES, _ROTATED_PAIRS, _WHOLE_ROW = (_L[n] for n in ("COSINES", "SINES", "PAIRS", "NORMS_WHOLE_ROW"))
_ATTENTION_NORM, _MLP_NORM, _ATTENTION_POST_NORM, _MLP_POST_NORM, _Q_NORM, _K_NORM, _RESIDUAL_MULTIPLIER = (
    _L[name]
    for name in (
        "ATTENTION_NORM",
        "MLP_NORM",
        "ATTENTION_POST_NORM",
        "MLP_POST_NORM",
        "Q_NORM",
        "K_NORM",
        "RESIDUAL_MULTIPLIER",
    )
)
_P = {word.name: int(word) for word in PassWord}
_TOKENS, _ROWS, _POSITIONS, _SPANS, _X, _NORMED, _HIDDEN_SIZE, _HIDDEN_STRIDE = (
    _P[n] for n in ("TOKENS", "ROWS", "POSITIONS", "SPANS", "X", "NORMED", "HIDDEN_SIZE", "HIDDEN_STRIDE")
)
_QKV_ROWS, _QKV_STRIDE, _ATTENDED, _ATTENDED_STRIDE, _PRODUCT, _PRODUCT_STRIDE, _GATED, _GATED_STRIDE = (
    _P[n]
    for n in (
        "QKV",
        "QKV_STRIDE",
        "ATTENDED",
        "ATTENDED_STRIDE",
        "PRODUCT",
        "PRODUCT_STRIDE",
        "GATED",
        "GATED_STRIDE",
    )
)
_LAYERS, _LAYER_COUNT, _NORM, _EMBEDDING_MULTIPLIER, _WANTED, _WANTED_COUNT, _CHOSEN = (
    _P[n] for n in ("LAYERS", "LAYER_COUNT", "NORM", "EMBEDDING_MULTIPLIER", "WANTED", "WANTED_COUNT", "CHOSEN")
)
_LOGITS, _LOGITS_STRIDE, _LOGIT_MULTIPLIER, _LOGIT_SOFTCAP, _SCRATCH, _SCRATCH_BYTES, _EMBEDDING, _HEAD = (
    _P[n]
    for n in (
        "LOGITS",
        "LOGITS_STRIDE",
        "LOGIT_MULTIPLIER",
        "LOGIT_SOFTCAP",
        "SCRATCH",
        "SCRATCH_BYTES",
        "EMBEDDING",
        "HEAD",
    )
)


@kernel
def _float_word(words: int, word: int) -> float:
    return from_bits(np.int32(get_word(words, word)))


@kernel
def norm(x: int, out: int, size: int, words: int, word: int) -> None:
    """Write the norm of `size` floats: x / sqrt(mean(x^2) + eps) * gain; x itself without a norm.

    words, word: where the address of the gains and then the epsilon stand. x and out may be the same.
    """
    gain = get_word(words, word)
    if not gain:
        for i in range(size):
            put_float(out, i, get_float(x, i))
        return
    squares = zeros()
    whole = size // LANES * LANES
    for i in range(0, whole, LANES):
        values = load_vector(x + 4 * i)
        squares = vector_fma(values, values, squares)
    total = lane_sum(squares)
    for i in range(whole, size):
        total = fma(get_float(x, i), get_float(x, i), total)
    factor = np.float32(1) / np.sqrt(total / np.float32(size) + _float_word(words, word + 1))
    for i in range(size):
        put_float(out, i, get_float(x, i) * factor * get_float(gain, i))


@kernel
def _embed(job: int, row: int) -> None:
    """Write a token's embedding."""
    product = job + 8 * _EMBEDDING
    token = get_word(get_word(job, _TOKENS), row)
    x = get_word(job, _X) + 4 * row * get_word(job, _HIDDEN_STRIDE)
    multiplier = _float_word(job, _EMBEDDING_MULTIPLIER)
    form, weights, panel_bytes = get_word(product, _FORM), get_word(product, _WEIGHTS), get_word(product, _PANEL_BYTES)
    for i in range(get_word(job, _HIDDEN_SIZE)):
        put_float(x, i, weight(form, weights, panel_bytes, token, i) * multiplier)


@kernel
def _rotate(job: int, layer: int, row: int) -> None:
    """Norm and rotate the heads of q and k of one token, in place."""
    attention_job = get_word(layer, _ATTENTION)
    size = get_word(attention_job, _HEAD_SIZE)
    kv_heads = get_word(attention_job, _HEADS)
    heads = kv_heads * get_word(attention_job, _GROUP)
    at = get_word(job, _QKV_ROWS) + 4 * row * get_word(job, _QKV_STRIDE)
    if get_word(layer, _WHOLE_ROW):
        norm(at, at, heads * size, layer, _Q_NORM)
        norm(at + 4 * heads * size, at + 4 * heads * size, kv_heads * size, layer, _K_NORM)
    elif get_word(layer, _Q_NORM):
        for head in range(heads + kv_heads):
            here = at + 4 * head * size
            norm(here, here, size, layer, _Q_NORM if head < heads else _K_NORM)
    if not get_word(layer, _COSINES):
        return
    pairs = get_word(layer, _ROTATED_PAIRS)
    position = get_word(get_word(job, _POSITIONS), row)
    cosines, sines = get_word(layer, _COSINES) + 4 * position * pairs, get_word(layer, _SINES) + 4 * position * pairs
    for head in range(heads + kv_heads):
        here = at + 4 * head * size
        for i in range(pairs):
            first, second = get_float(here, i), get_float(here, pairs + i)
            cosine, sine = get_float(cosines, i), get_float(sines, i)
            put_float(here, i, fma(first, cosine, -(second * sine)))
            put_float(here, pairs + i, fma(second, cosine, first * sine))


@kernel
def _multiply(product: int, ticket: int, rows: int, x: int, x_stride: int, y: int, y_stride: int, scratch: int) -> int:
    """Compute 64 outputs of a product; return their address in y. Strides are in floats."""
    out = y + ticket * 2 * PANEL * 4
    panel_bytes = get_word(product, _PANEL_BYTES)
    clear(rows, out, 4 * y_stride)
    add_product(
        get_word(product, _FORM),
        rows,
        x,
        4 * x_stride,
        get_word(product, _WEIGHTS) + 2 * ticket * panel_bytes,
        panel_bytes,
        get_word(product, _DEPTH),
        out,
        4 * y_stride,
        scratch,
    )
    if get_word(product, _BIAS):
        bias = get_word(product, _BIAS) + ticket * 2 * PANEL * 4
        for r in range(rows):
            for n in range(2 * PANEL):
                put_float(out + 4 * r * y_stride, n, get_float(out + 4 * r * y_stride, n) + get_float(bias, n))
    return out


@kernel
def _product(
    job: int, phase: int, product: int, rows: int, x: int, x_stride: int, y: int, y_stride: int, scratch: int
) -> None:
    """Do this thread's part of a product."""
    pairs = get_word(product, _PAIRS)
    ticket = draw(job, phase)
    while ticket < pairs:
        _multiply(product, ticket, rows, x, x_stride, y, y_stride, scratch)
        ticket = draw(job, phase)


@kernel
def _gated_product(job: int, phase: int, layer: int, scratch: int) -> None:
    """Do this thread's part of activation(gate(x)) * up(x)."""
    rows, stride, gated_stride = get_word(job, _ROWS), get_word(job, _PRODUCT_STRIDE), get_word(job, _GATED_STRIDE)
    product = layer + 8 * _GATE_UP
    activation = get_word(layer, _ACTIVATION)
    pairs = get_word(product, _PAIRS)
    ticket = draw(job, phase)
    while ticket < pairs:
        out = _multiply(
            product,
            ticket,
            rows,
            get_word(job, _NORMED),
            get_word(job, _HIDDEN_STRIDE),
            get_word(job, _PRODUCT),
            stride,
            scratch,
        )
        for r in range(rows):
            gate, up = out + 4 * r * stride, out + 4 * (r * stride + PANEL)
            gated = get_word(job, _GATED) + 4 * (r * gated_stride + ticket * PANEL)
            if activation == 0:
                for n in range(PANEL):
                    put_float(gated, n, silu(get_float(gate, n)) * get_float(up, n))
            elif activation == 1:
                for n in range(PANEL):
                    put_float(gated, n, gelu(get_float(gate, n)) * get_float(up, n))
            else:
                for n in range(PANEL):
                    put_float(gated, n, gelu_tanh(get_float(gate, n)) * get_float(up, n))
        ticket = draw(job, phase)


@kernel
def _add(job: int, phase: int, layer: int, post_norm: int, words: int, next_norm: int) -> None:
    """Add a product to the residual stream and norm the sum: this thread's rows.

    post_norm: word of the layer's norm of the product. words, next_norm: where the norm of the sum stands.
    """
    rows, size = get_word(job, _ROWS), get_word(job, _HIDDEN_SIZE)
    stride, product_stride = get_word(job, _HIDDEN_STRIDE), get_word(job, _PRODUCT_STRIDE)
    multiplier = _float_word(layer, _RESIDUAL_MULTIPLIER)
    row = draw(job, phase)
    while row < rows:
        x = get_word(job, _X) + 4 * row * stride
        y = get_word(job, _PRODUCT) + 4 * row * product_stride
        if get_word(layer, post_norm):
            norm(y, y, size, layer, post_norm)
        for i in range(size):
            put_float(x, i, fma(get_float(y, i), multiplier, get_float(x, i)))
        norm(x, get_word(job, _NORMED) + 4 * row * stride, size, words, next_norm)
        row = draw(job, phase)


@kernel
def _logits(job: int, phase: int, rows: int, x: int, scratch: int) -> None:
    """Do this thread's part of the head's product, with multiplier and cap."""
    head, stride = job + 8 * _HEAD, get_word(job, _LOGITS_STRIDE)
    multiplier, softcap = _float_word(job, _LOGIT_MULTIPLIER), _float_word(job, _LOGIT_SOFTCAP)
    ticket = draw(job, phase)
    while ticket < get_word(head, _PAIRS):
        out = _multiply(head, ticket, rows, x, get_word(job, _HIDDEN_STRIDE), get_word(job, _LOGITS), stride, scratch)
        if multiplier != np.float32(1) or softcap > np.float32(0):
            for r in range(rows):
                here = out + 4 * r * stride
                for n in range(2 * PANEL):
                    logit = get_float(here, n) * multiplier
                    put_float(here, n, tanh(logit / softcap) * softcap if softcap > np.float32(0) else logit)
        ticket = draw(job, phase)


def _decode(store_ticket: Callable[..., None], attend_ticket: Callable[..., None]) -> Callable[[int], None]:
    """Return the forward pass for one type of keys and values. Its argument is the address of a pass."""

    @kernel
    def decode(job: int) -> None:
        team = team_size(job)
        scratch = get_word(job, _SCRATCH) + take_seat(job) * get_word(job, _SCRATCH_BYTES)
        rows, size, stride = get_word(job, _ROWS), get_word(job, _HIDDEN_SIZE), get_word(job, _HIDDEN_STRIDE)
        x, normed = get_word(job, _X), get_word(job, _NORMED)
        product, product_stride = get_word(job, _PRODUCT), get_word(job, _PRODUCT_STRIDE)
        layer, layers = get_word(job, _LAYERS), get_word(job, _LAYER_COUNT)
        phase = 0
        row = draw(job, phase)
        while row < rows:
            if get_word(job, _TOKENS):
                _embed(job, row)
            words, word = (layer, _ATTENTION_NORM) if layers else (job, _NORM)
            norm(x + 4 * row * stride, normed + 4 * row * stride, size, words, word)
            row = draw(job, phase)
        phase = finish(job, phase, team)
        for number in range(layers):
            qkv, qkv_stride = get_word(job, _QKV_ROWS), get_word(job, _QKV_STRIDE)
            _product(job, phase, layer + 8 * _QKV, rows, normed, stride, qkv, qkv_stride, scratch)
            phase = finish(job, phase, team)
            row = draw(job, phase)
            while row < rows:
                _rotate(job, layer, row)
                row = draw(job, phase)
            phase = finish(job, phase, team)
            attention_job, spans = get_word(layer, _ATTENTION), get_word(job, _SPANS)
            ticket = draw(job, phase)
            while ticket < spans:
                store_ticket(attention_job, ticket, scratch)
                ticket = draw(job, phase)
            phase = finish(job, phase, team)
            ticket = draw(job, phase)
            while ticket < spans * get_word(attention_job, _HEADS):
                attend_ticket(attention_job, ticket, scratch)
                ticket = draw(job, phase)
            phase = finish(job, phase, team)
            attended, attended_stride = get_word(job, _ATTENDED), get_word(job, _ATTENDED_STRIDE)
            _product(job, phase, layer + 8 * _OUT, rows, attended, attended_stride, product, product_stride, scratch)
            phase = finish(job, phase, team)
            _add(job, phase, layer, _ATTENTION_POST_NORM, layer, _MLP_NORM)
            phase = finish(job, phase, team)
            _gated_product(job, phase, layer, scratch)
            phase = finish(job, phase, team)
            gated, gated_stride = get_word(job, _GATED), get_word(job, _GATED_STRIDE)
            _product(job, phase, layer + 8 * _DOWN, rows, gated, gated_stride, product, product_stride, scratch)
            phase = finish(job, phase, team)
            following = layer + 8 * LAYER_WORDS
            if number + 1 < layers:
                _add(job, phase, layer, _MLP_POST_NORM, following, _ATTENTION_NORM)
            else:
                _add(job, phase, layer, _MLP_POST_NORM, job, _NORM)
            phase = finish(job, phase, team)
            layer = following
        wanted = get_word(job, _WANTED_COUNT)
        if not wanted:
            return
        chosen = get_word(job, _CHOSEN)
        row = draw(job, phase)
        while row < wanted:
            source = normed + 4 * stride * get_word(get_word(job, _WANTED), row)
            for i in range(size):
                put_float(chosen + 4 * row * stride, i, get_float(source, i))
            row = draw(job, phase)
        phase = finish(job, phase, team)
        _logits(job, phase, wanted, chosen, scratch)

    return decode


decode_bfloat16 = _decode(STORE_BFLOAT16, ATTEND_BFLOAT16)
decode_float32 = _decode(STORE_FLOAT32, ATTEND_FLOAT32)


@kernel
def multiply_rows(job: int) -> None:
    """Do only a pass's head product, over all of `X`'s rows."""
    scratch = get_word(job, _SCRATCH) + take_seat(job) * get_word(job, _SCRATCH_BYTES)
    _logits(job, 0, get_word(job, _ROWS), get_word(job, _X), scratch)


def _attend(store_ticket: Callable[..., None], attend_ticket: Callable[..., None]) -> Callable[[int], None]:
    """Return the attention of one layer alone, for models that torch computes. Its argument is the address of a pass
    of which only `ATTENDED` (here the attention job), `SPANS` and the scratch buffers are used."""

    @kernel
    def attend(job: int) -> None:
        team = team_size(job)
        scratch = get_word(job, _SCRATCH) + take_seat(job) * get_word(job, _SCRATCH_BYTES)
        attention_job, spans = get_word(job, _ATTENDED), get_word(job, _SPANS)
        ticket = draw(job, 0)
        while ticket < spans:
            store_ticket(attention_job, ticket, scratch)
            ticket = draw(job, 0)
        phase = finish(job, 0, team)
        ticket = draw(job, phase)
        while ticket < spans * get_word(attention_job, _HEADS):
            attend_ticket(attention_job, ticket, scratch)
            ticket = draw(job, phase)
        finish(job, phase, team)

    return attend


attend_bfloat16 = _attend(STORE_BFLOAT16, ATTEND_BFLOAT16)
attend_float32 = _attend(STORE_FLOAT32, ATTEND_FLOAT32)
