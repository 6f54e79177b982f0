"""Attention of a few new tokens over a stored cache."""

from pallas_kernels.decode_attention.ops import DecodeOut, decode_attention, reads_blocks

__all__ = ["DecodeOut", "decode_attention", "reads_blocks"]
