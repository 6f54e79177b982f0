"""Writes to a cache: append, compaction, copies of pages."""

from pallas_kernels.cache_write.ops import append, append_paged, compact, copy_pages

__all__ = ["append", "append_paged", "compact", "copy_pages"]
