"""The device code of `scorer.engine.triton_head`, which imports this module when its first head is made.

Triton reads TRITON_INTERPRET when this module is imported, and compiles for a GPU or interprets in numpy accordingly.
Where there is no Triton the module can be imported and nothing in it be run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import triton  # type: ignore[import-untyped]
    import triton.language as tl  # type: ignore[import-untyped]
except ImportError:
    triton = tl = None


# Triton's compiler takes no annotations but its own, and looks up those that it finds.


def _jit(function: Callable[..., Any]) -> Any:
    """The function as Triton compiles it, once for all batch sizes."""
    return triton.jit(function, do_not_specialize=["rows", "row_tiles"]) if triton else function


@_jit
def load_tile(  # type: ignore[no-untyped-def]  # noqa: PLR0917
    matrix,
    first_row,
    first_column,
    rows,
    width: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
    uses_descriptors: tl.constexpr,
):
    """Reads [tile_rows, tile_columns] of a row-major matrix [rows, width]; columns past the end are 0.

    Rows past the end are 0 with descriptors, and the last row again with pointers (which spares a mask). Nothing
    comes of them either way: ids past the vocabulary are masked as logits, rows past the last are not written.
    """
    if uses_descriptors:
        tile = matrix.load([first_row, first_column])
    else:
        row = tl.minimum(first_row + tl.arange(0, tile_rows), rows - 1).to(tl.int64)  # rows x width may pass 2^31
        column = first_column + tl.arange(0, tile_columns)
        pointers = matrix + row[:, None] * width + column[None, :]
        if width % tile_columns == 0:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=column[None, :] < width, other=0.0)
    return tile


@_jit
def partial_nll(  # type: ignore[no-untyped-def]  # noqa: PLR0917
    hidden,
    weight,
    bias,
    targets,
    references,
    totals,
    picks,
    rows,
    vocabulary,
    row_tiles,
    width: tl.constexpr,
    splits: tl.constexpr,
    has_bias: tl.constexpr,
    uses_descriptors: tl.constexpr,
    flatten: tl.constexpr,
    precision: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_tokens: tl.constexpr,
    tile_width: tl.constexpr,
):
    """One program: the logits of `tile_rows` rows over one split of the vocabulary, a tile of it at a time.

    A row's terms are summed as 2^(logit·log2(e) - reference), the reference a whole number not below the largest
    exponent so far: moving it on scales the sum by a power of two, which is exact, so how the vocabulary is split
    costs no precision.

    Programs run in the order of their ids, so those that run together have the same split and read the same tiles of
    the weight, which then come from the L2 cache.

    Args:
        hidden: [rows, width], a pointer or a tensor descriptor with blocks of [tile_rows, tile_width].
        weight: [vocabulary, width], likewise with blocks of [tile_tokens, tile_width].
        bias: [vocabulary], in the weight's dtype; any pointer where has_bias is false.
        targets: int64 [rows].
        references: float32 [splits, rows], written.
        totals: float32 [splits, rows], written: the sums, in units of 2^reference.
        picks: float32 [splits, rows], written: the target's logit; 0 where the target is in another split.
        rows: N.
        vocabulary: V.
        row_tiles: cdiv(rows, tile_rows); the grid is row_tiles x splits programs.
        width: D.
        splits: parts of the vocabulary; those beyond its number of tiles are empty.
        has_bias: whether there is one.
        uses_descriptors: whether hidden and weight are descriptors.
        flatten: whether the loops over the vocabulary and the width become one, so that the next tile of the
            vocabulary is on its way while the last is summed up.
        precision: of products in float32; half precision has no choice.
        tile_rows: rows of a program.
        tile_tokens: ids at a time.
        tile_width: columns at a time.
    """
    log2_e: tl.constexpr = 1.4426950408889634
    # Below any logit, and finite: -inf would make -inf - -inf, which is NaN, of a tile whose logits all are -inf.
    lowest: tl.constexpr = -1e38
    program = tl.program_id(0)
    split = program // row_tiles
    first_row = (program % row_tiles) * tile_rows
    row = first_row + tl.arange(0, tile_rows)
    target = tl.load(targets + row, mask=row < rows, other=-1).to(tl.int32)
    reference = tl.full([tile_rows], lowest, tl.float32)
    total = tl.zeros([tile_rows], tl.float32)
    picked = tl.zeros([tile_rows], tl.float32)
    tiles = tl.cdiv(vocabulary, tile_tokens)
    for tile in tl.range(tiles * split // splits, tiles * (split + 1) // splits, flatten=flatten):
        first_token = tile * tile_tokens
        logits = tl.zeros([tile_rows, tile_tokens], tl.float32)
        for column in range(0, width, tile_width):
            left = load_tile(hidden, first_row, column, rows, width, tile_rows, tile_width, uses_descriptors)
            right = load_tile(weight, first_token, column, vocabulary, width, tile_tokens, tile_width, uses_descriptors)
            logits = tl.dot(left, right.T, logits, input_precision=precision)
        token = first_token + tl.arange(0, tile_tokens)
        if has_bias:
            logits += tl.load(bias + token, mask=token < vocabulary, other=0.0).to(tl.float32)[None, :]
        logits = tl.where(token[None, :] < vocabulary, logits, -float("inf"))
        picked += tl.sum(tl.where(token[None, :] == target[:, None], logits, 0.0), axis=1)
        # A NaN does not show in the maximum, and does in the sum.
        largest = tl.maximum(reference, tl.ceil(tl.max(logits, axis=1) * log2_e))
        terms = tl.exp2(logits * log2_e - largest[:, None])
        total = total * tl.exp2(reference - largest) + tl.sum(terms, axis=1)
        reference = largest
    cell = split.to(tl.int64) * rows + row
    tl.store(references + cell, reference, mask=row < rows)
    tl.store(totals + cell, total, mask=row < rows)
    tl.store(picks + cell, picked, mask=row < rows)
