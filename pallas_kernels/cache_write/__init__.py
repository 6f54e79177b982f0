"""Writes to a cache: append, quantize and append, group flush, compaction, copies of pages."""

from pallas_kernels.cache_write.ops import append, append_paged, compact, copy_pages
from pallas_kernels.cache_write.quantized import (
    append_residual,
    append_tokens,
    flush_residual,
    flush_size,
)

__all__ = [
    "append",
    "append_paged",
    "append_residual",
    "append_tokens",
    "compact",
    "copy_pages",
    "flush_residual",
    "flush_size",
]
