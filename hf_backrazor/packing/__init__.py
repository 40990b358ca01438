"""Tensors to their stored form and back. Knows nothing of autograd, modules or models."""

from .bits import pack_bits, unpack_bits
from .cells import Cells, decode_cells, encode_cells
from .codes import CODE_BITS, Codes, decode, encode
from .index import index_coding
from .layout import Layout, Packed
from .packed import PackSpec, SparseLayout, pack
from .select import kept_count, topk_mask

__all__ = [
    "CODE_BITS",
    "Cells",
    "Codes",
    "Layout",
    "PackSpec",
    "Packed",
    "SparseLayout",
    "decode",
    "decode_cells",
    "encode",
    "encode_cells",
    "index_coding",
    "kept_count",
    "pack",
    "pack_bits",
    "topk_mask",
    "unpack_bits",
]
