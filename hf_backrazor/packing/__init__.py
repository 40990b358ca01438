"""Tensors to their stored form and back. Knows nothing of autograd, modules or models."""

from .bits import pack_bits, unpack_bits
from .cells import CellCodes, Cells, CellTable, decode_cells, decode_cells_as_integers, encode_cells
from .codes import CODE_BITS, Codes, decode, encode
from .index import index_coding
from .integers import Integers, Kept, decode_integers, fast_with_integers, weight_gradient
from .layout import Layout, Packed, RowMap
from .normalised import (
    batch_norm_gradients,
    norm_gradients,
    packed_batch_norm_gradients,
    packed_norm_gradients,
)
from .packed import PackSpec, SparseLayout, pack, pack_spec, sparse_layout
from .rotation import rotate, unrotate
from .select import kept_count, topk_mask
from .steps import Steps, pack_steps, times_steps

__all__ = [
    "CODE_BITS",
    "CellCodes",
    "CellTable",
    "Cells",
    "Codes",
    "Integers",
    "Kept",
    "Layout",
    "PackSpec",
    "Packed",
    "RowMap",
    "SparseLayout",
    "Steps",
    "batch_norm_gradients",
    "decode",
    "decode_cells",
    "decode_cells_as_integers",
    "decode_integers",
    "encode",
    "encode_cells",
    "fast_with_integers",
    "index_coding",
    "kept_count",
    "norm_gradients",
    "pack",
    "pack_bits",
    "pack_spec",
    "pack_steps",
    "packed_batch_norm_gradients",
    "packed_norm_gradients",
    "rotate",
    "sparse_layout",
    "times_steps",
    "topk_mask",
    "unpack_bits",
    "unrotate",
    "weight_gradient",
]
