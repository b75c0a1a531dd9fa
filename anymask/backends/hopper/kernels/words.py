"""Words of partial tiles in the layout of a warpgroup's accumulator: every thread has what belongs to its scores."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from anymask.backends.hopper.kernels.pipeline import TILE
from anymask.backends.hopper.kernels.scheduler import list_index

# query rows of a consumer warpgroup
ROWS = gl.constexpr(64)


@gluon.jit
def to_quad_view(x):
    """`x [ROWS, N]` of an accumulator as `[ROWS, N // 8, 4, 2]`: the third index is a thread of the quad."""
    return x.reshape([x.shape[0], x.shape[1] // 8, 4, 2])


@gluon.jit
def from_quad_view(x, LAYOUT: gl.constexpr):
    """Undo `to_quad_view`; nothing moves."""
    return gl.convert_layout(x.reshape([x.shape[0], x.shape[1] * 8]), LAYOUT, assert_trivial=True)


@gluon.jit
def zero_words(BLOCK_N: gl.constexpr, S_LAYOUT: gl.constexpr):
    """int32 `[ROWS, 4]` zeros: a word for each row and thread of the quad, as row maxima and row sums are too."""
    L4: gl.constexpr = to_quad_view(gl.zeros([ROWS, BLOCK_N], gl.int32, S_LAYOUT)).type.layout
    return gl.zeros([ROWS, 4], gl.int32, gl.SliceLayout(1, gl.SliceLayout(3, L4)))


@gluon.jit
def load_words(words, first_row, pred, mask_rows, W_LAYOUT: gl.constexpr, PACK_GQA: gl.constexpr):
    """int32 `[ROWS, 4]`: words of the rows of a tile that starts at `words`, all ones without `pred`.

    PACK_GQA: rows of several heads, which have the same `mask_rows` of the mask.
    """
    rows = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, W_LAYOUT))
    if PACK_GQA:
        rows = rows % mask_rows
    offs = rows.expand_dims(1) * 4 + gl.arange(0, 4, layout=gl.SliceLayout(0, W_LAYOUT)).expand_dims(0)
    return gl.load(words + offs, mask=pred, other=-1)


@gluon.jit
def load_column_words(words, column, j, offs, cfg: gl.constexpr):
    """int32 `[TILE, 4]`: words of the j-th tile of a column, all ones where none is stored; `offs`: in a tile."""
    n_partial = column.n_partial
    entry = (column.partial_begin + list_index(j, n_partial, column.tile, cfg.IN_TURN)).to(gl.int64)
    return gl.load(words + entry * (TILE * 4) + offs, mask=offs * 0 + j < n_partial, other=-1)


@gluon.jit
def tail_words(columns, W_LAYOUT: gl.constexpr):
    """int32 `[ROWS, 4]`: words of a tile that ends after `columns` of its 128 columns."""
    c = gl.arange(0, 4, layout=gl.SliceLayout(0, W_LAYOUT))
    # columns ascend with the bits of a word (bits.py), so a word is a run of ones from its lowest bit
    bits = columns // 8 * 2 + gl.minimum(gl.maximum(columns % 8 - 2 * c, 0), 2)
    words = gl.where(bits == 32, -1, (1 << (bits & 31)) - 1)
    return words.expand_dims(0) + gl.zeros([ROWS, 4], gl.int32, W_LAYOUT)
