"""Append, compact and copy: every write to a cache, in place on donated buffers."""

from __future__ import annotations

import jax

from pallas_kernels.cache_write import tpu
from pallas_kernels.cache_write.reference import append_paged_xla, append_xla, compact_xla, copy_pages_xla
from pallas_kernels.platform import check_dtype, check_shape, choose_implementation, require_platform

Array = jax.Array


def append(cache: Array, new: Array, slots: Array, *, implementation: str | None = None) -> Array:
    """Write new entries into chosen slots of a dense cache.

    Args:
      cache: [batch, kv_heads, slots, ...], any trailing shape (keys, values, scales, positions). Donate it.
      new: [batch, kv_heads, tokens, ...], cast to the cache's dtype.
      slots: int32 [batch, kv_heads, tokens], where each entry goes; -1 or past the end drops the entry. No
        slot may appear twice in a (row, head).
      implementation: "xla", "mosaic_tpu" (one token at a time), or None for the best here.

    Returns: the cache with the entries written.

    Raises:
      ValueError: shapes that do not fit, or an `implementation` that cannot run.
    """
    check_shape("append", "slots", slots.shape, (*cache.shape[:2], None))
    check_shape("append", "new", new.shape, (*slots.shape, *cache.shape[3:]))
    check_dtype("append", "slots", slots.dtype, ("int32",))
    unsupported = {
        "mosaic_tpu": require_platform("tpu") or tpu.unsupported(cache, slots),
        "xla": None,
    }
    chosen = choose_implementation("append", implementation, unsupported, ("mosaic_tpu", "xla"))
    return (tpu.append_tpu if chosen == "mosaic_tpu" else append_xla)(cache, new, slots)


def append_paged(
    pool: Array, new: Array, pages: Array, offsets: Array, *, implementation: str | None = None
) -> Array:
    """Write new entries into a page pool.

    Args:
      pool: [pages, page_size, ...]. Donate it.
      new: [*lead, ...], cast to the pool's dtype; `lead` is any shape, such as [batch, kv_heads, tokens].
      pages: int32 [*lead], physical page of each entry; -1 or past the end drops the entry.
      offsets: int32 [*lead], place in the page; -1 or past the end drops the entry.
      implementation: "xla", or None for the best here.

    Returns: the pool with the entries written.

    Raises:
      ValueError: shapes that do not fit, or an `implementation` that cannot run.
    """
    check_shape("append_paged", "offsets", offsets.shape, pages.shape)
    check_shape("append_paged", "new", new.shape, (*pages.shape, *pool.shape[2:]))
    check_dtype("append_paged", "pages", pages.dtype, ("int32",))
    check_dtype("append_paged", "offsets", offsets.dtype, ("int32",))
    choose_implementation("append_paged", implementation, {"xla": None}, ("xla",))
    return append_paged_xla(pool, new, pages, offsets)


def compact(store: Array, index: Array, *, implementation: str | None = None) -> Array:
    """Keep chosen slots: gather by index.

    Args:
      store: [batch, kv_heads, slots, ...].
      index: int32 [batch, kv_heads, kept], slots to keep in the order wanted; -1 leaves zeros.
      implementation: "xla", or None for the best here.

    Returns: [batch, kv_heads, kept, ...].

    Raises:
      ValueError: shapes that do not fit, or an `implementation` that cannot run.
    """
    check_shape("compact", "index", index.shape, (*store.shape[:2], None))
    check_dtype("compact", "index", index.dtype, ("int32",))
    choose_implementation("compact", implementation, {"xla": None}, ("xla",))
    return compact_xla(store, index)


def copy_pages(pool: Array, source: Array, target: Array, *, implementation: str | None = None) -> Array:
    """Copy whole pages inside a pool (copy on write, defragmentation).

    Args:
      pool: [pages, page_size, ...]. Donate it.
      source: int32 [n], pages to read, all read before any is written.
      target: int32 [n], pages to write; -1 or past the end drops the copy. No target may appear twice.
      implementation: "xla", or None for the best here.

    Returns: the pool with the pages copied.

    Raises:
      ValueError: shapes that do not fit, or an `implementation` that cannot run.
    """
    check_shape("copy_pages", "source", source.shape, (None,))
    check_shape("copy_pages", "target", target.shape, source.shape)
    check_dtype("copy_pages", "source", source.dtype, ("int32",))
    check_dtype("copy_pages", "target", target.dtype, ("int32",))
    choose_implementation("copy_pages", implementation, {"xla": None}, ("xla",))
    return copy_pages_xla(pool, source, target)
