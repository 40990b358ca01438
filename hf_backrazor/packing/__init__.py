"""Tensors to their stored form and back. Knows nothing of autograd, modules or models."""

from .bits import pack_bits, unpack_bits
from .codes import CODE_BITS, Codes, decode, decode_grid, encode, encode_grid
from .packed import Layout, Packed, PackSpec, pack
from .select import kept_count, topk_mask

__all__ = [
    "CODE_BITS",
    "Codes",
    "Layout",
    "PackSpec",
    "Packed",
    "decode",
    "decode_grid",
    "encode",
    "encode_grid",
    "kept_count",
    "pack",
    "pack_bits",
    "topk_mask",
    "unpack_bits",
]
