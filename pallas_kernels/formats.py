"""How keys and values are stored: one dataclass, six formats, and their encoders.

Every array has the slots on the axis before the channels (or last, for one number per slot), so that appends,
gathers and page copies treat all of them alike. `rows_per_slot` of a field says how many slots share a row.

| format | k, v | scales |
|---|---|---|
| dense | [batch, kv_heads, slots, head_dim] bf16, f16 or f32 | none |
| fp8_e4m3, fp8_e5m2, int8 | the same shape, 1 byte | k_scale, v_scale [batch, kv_heads, slots] f32 or bf16 |
| int4, int2 | uint8 [batch, kv_heads, slots * bits / 8, head_dim] | k_scale, k_zero [.., slots / group,
head_dim]; v_scale, v_zero [.., head_dim / group, slots] |

In the Ragged layout [batch, kv_heads, slots] is replaced by [pages, page_size] in all of them.

int4 and int2 (KIVI, arXiv 2402.02750): x = code * scale + zero, keys per channel over `group` tokens, values
per token over `group` channels. A byte holds 2 or 4 tokens of one channel, never two channels, so that the
last dimension stays head_dim: 128 lanes cost on TPU exactly what they hold. Slots are packed in blocks of 64
(int4) or 128 (int2): byte row r of 32 holds slots r + 32 j of the block, j-th field from the low bits.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

Array = jax.Array

DENSE = "dense"
EIGHT_BIT = {"fp8_e4m3": jnp.float8_e4m3fn, "fp8_e5m2": jnp.float8_e5m2, "int8": jnp.int8}
PACKED_BITS = {"int4": 4, "int2": 2}
FORMATS = (DENSE, *EIGHT_BIT, *PACKED_BITS)
_ROWS = 32  # byte rows of a pack block


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "k", "v", "k_scale", "v_scale", "k_zero", "v_zero", "k_res", "v_res", "res_lengths",
    ],
    meta_fields=["format", "group"],
)  # fmt: skip
@dataclasses.dataclass(frozen=True)
class KVStore:
    """Keys and values of one layer as stored; shapes of Dense (Ragged: [pages, page_size] lead instead)."""

    k: Array  # [batch, kv_heads, slots, head_dim], see the module's table
    v: Array  # [batch, kv_heads, slots, head_dim], see the module's table
    k_scale: Array | None = None  # 8 bits: [batch, kv_heads, slots]; packed: [.., slots / group, head_dim]
    v_scale: Array | None = None  # 8 bits: [batch, kv_heads, slots]; packed: [.., head_dim / group, slots]
    k_zero: Array | None = None  # packed only, as k_scale
    v_zero: Array | None = None  # packed only, as v_scale
    k_res: Array | None = None  # [batch, kv_heads, residual, head_dim] newest tokens in full precision
    v_res: Array | None = None  # [batch, kv_heads, residual, head_dim]
    res_lengths: Array | None = None  # int32 [batch, kv_heads], valid entries of the residual window
    format: str = DENSE
    group: int = 64  # packed formats: tokens per key group and channels per value group

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.k.shape[-1]

    @property
    def slots_per_row(self) -> int:
        """Slots that share one row of `k`: 1, or 2 (int4), or 4 (int2)."""
        return 8 // PACKED_BITS[self.format] if self.format in PACKED_BITS else 1

    @property
    def slots(self) -> int:
        """Slots per (row, head) in the Dense layout, per page in Ragged; without the residual window."""
        return self.k.shape[-2] * self.slots_per_row

    @property
    def residual(self) -> int:
        """Entries of the full-precision window, 0 if there is none."""
        return 0 if self.k_res is None else self.k_res.shape[2]

    def slot_fields(self) -> dict[str, tuple[int, int]]:
        """Fields that hold slots: name -> (axis of the slots, slots per step along it)."""
        per = self.slots_per_row
        fields = {"k": (-2, per), "v": (-2, per)}
        if self.format in EIGHT_BIT:
            fields |= {"k_scale": (-1, 1), "v_scale": (-1, 1)}
        elif self.format in PACKED_BITS:
            fields |= {name: (-2, self.group) for name in ("k_scale", "k_zero")}
            fields |= {name: (-1, 1) for name in ("v_scale", "v_zero")}
        return fields


def pack_block(format: str) -> int:
    """Slots in one pack block; slots and page sizes of the format are multiples of it (and of the group)."""
    return _ROWS * 8 // PACKED_BITS[format] if format in PACKED_BITS else 1


def pack(codes: Array, bits: int) -> Array:
    """Codes [..., slots, head_dim] in 0 .. 2**bits - 1 -> uint8 [..., slots * bits / 8, head_dim].

    Raises:
      ValueError: slots not a multiple of the pack block (64 for 4 bits, 128 for 2).
    """
    per = 8 // bits
    *lead, slots, dim = codes.shape
    if slots % (_ROWS * per):
        raise ValueError(f"pack: {slots} slots; {bits}-bit codes are packed in blocks of {_ROWS * per}")
    fields = codes.astype(jnp.uint8).reshape(*lead, slots // (_ROWS * per), per, _ROWS, dim)
    shifts = (bits * jnp.arange(per, dtype=jnp.uint8))[:, None, None]
    # The fields do not overlap, so that their sum is their union.
    return (fields << shifts).sum(-3, dtype=jnp.uint8).reshape(*lead, slots // per, dim)


def unpack(packed: Array, bits: int) -> Array:
    """The inverse of `pack`: uint8 [..., rows, head_dim] -> uint8 codes [..., rows * 8 / bits, head_dim]."""
    per = 8 // bits
    *lead, rows, dim = packed.shape
    blocks = packed.reshape(*lead, rows // _ROWS, 1, _ROWS, dim)
    shifts = (bits * jnp.arange(per, dtype=jnp.uint8))[:, None, None]
    return ((blocks >> shifts) & jnp.uint8(2**bits - 1)).reshape(*lead, rows * per, dim)


def quantize_tokens(x: Array, format: str, scale_dtype: jnp.dtype = jnp.float32) -> tuple[Array, Array]:
    """Symmetric 8-bit codes per token and head.

    Args:
      x: [..., slots, head_dim].
      format: "int8", "fp8_e4m3" or "fp8_e5m2".
      scale_dtype: float32 or bfloat16; the codes are rounded with the stored scale.

    Returns: codes [..., slots, head_dim], scale [..., slots] (1 for an all-zero token); x ~ codes * scale.
    """
    dtype = EIGHT_BIT[format]
    top = 127.0 if format == "int8" else float(jnp.finfo(dtype).max)
    x = x.astype(jnp.float32)
    peak = jnp.abs(x).max(-1)
    scale = jnp.where(peak > 0, peak / top, 1.0).astype(scale_dtype)
    y = jnp.clip(x / scale.astype(jnp.float32)[..., None], -top, top)
    return (jnp.round(y) if format == "int8" else y).astype(dtype), scale


def _asymmetric(x: Array, axis: int, bits: int, dtype: jnp.dtype) -> tuple[Array, Array, Array]:
    """Codes (shape of x), scale and zero (axis removed); scale 1 where the group is constant."""
    low, high = x.min(axis), x.max(axis)
    zero = low.astype(dtype)
    scale = ((high - low) / (2**bits - 1)).astype(dtype)
    scale = jnp.where(scale > 0, scale, jnp.ones((), dtype))
    z, s = (jnp.expand_dims(a.astype(jnp.float32), axis) for a in (zero, scale))
    return jnp.clip(jnp.round((x - z) / s), 0, 2**bits - 1).astype(jnp.uint8), scale, zero


def quantize_keys(
    k: Array, bits: int, group: int, dtype: jnp.dtype = jnp.float16
) -> tuple[Array, Array, Array]:
    """KIVI keys: per channel over groups of tokens.

    Args:
      k: [..., slots, head_dim]; slots a multiple of the pack block and of `group`.
      bits: 4 or 2.
      group: tokens per group.
      dtype: of scale and zero.

    Returns: packed uint8 [..., slots * bits / 8, head_dim], scale and zero [..., slots / group, head_dim].
    """
    *lead, slots, dim = k.shape
    if group < 1 or slots % group:
        raise ValueError(f"quantize_keys: {slots} slots are not whole groups of {group}")
    grouped = k.astype(jnp.float32).reshape(*lead, slots // group, group, dim)
    codes, scale, zero = _asymmetric(grouped, -2, bits, dtype)
    return pack(codes.reshape(k.shape), bits), scale, zero


def quantize_values(
    v: Array, bits: int, group: int, dtype: jnp.dtype = jnp.float16
) -> tuple[Array, Array, Array]:
    """KIVI values: per token over groups of channels.

    Args and errors as in `quantize_keys`; `group` divides head_dim.

    Returns: packed uint8 [..., slots * bits / 8, head_dim], scale and zero [..., head_dim / group, slots].
    """
    *lead, slots, dim = v.shape
    if group < 1 or dim % group:
        raise ValueError(f"quantize_values: head_dim={dim} is not whole groups of {group}")
    grouped = v.astype(jnp.float32).reshape(*lead, slots, dim // group, group)
    codes, scale, zero = _asymmetric(grouped, -1, bits, dtype)
    return pack(codes.reshape(v.shape), bits), jnp.swapaxes(scale, -1, -2), jnp.swapaxes(zero, -1, -2)


def encode(
    k: Array, v: Array, format: str, *, group: int = 64, meta_dtype: jnp.dtype | None = None
) -> KVStore:
    """Store keys and values in a format, without a residual window.

    Args:
      k, v: [batch, kv_heads, slots, head_dim] (Dense) or [pages, page_size, head_dim] (Ragged pool).
      format: one of `FORMATS`; "dense" keeps the arrays as they are.
      group: packed formats: tokens per key group and channels per value group.
      meta_dtype: dtype of scales and zeros; default float32 (8 bits) and float16 (packed).

    Returns: the KVStore.

    Raises:
      ValueError: unknown format, or slots and head_dim that do not divide into groups and pack blocks.
    """
    if format == DENSE:
        return KVStore(k, v)
    if format in EIGHT_BIT:
        dtype = jnp.float32 if meta_dtype is None else meta_dtype
        (kc, ks), (vc, vs) = (quantize_tokens(x, format, dtype) for x in (k, v))
        return KVStore(kc, vc, ks, vs, format=format)
    if format in PACKED_BITS:
        dtype = jnp.float16 if meta_dtype is None else meta_dtype
        kc, ks, kz = quantize_keys(k, PACKED_BITS[format], group, dtype)
        vc, vs, vz = quantize_values(v, PACKED_BITS[format], group, dtype)
        return KVStore(kc, vc, ks, vs, kz, vz, format=format, group=group)
    raise ValueError(f"encode: unknown format {format!r}; choose one of {list(FORMATS)}")


def decode(store: KVStore) -> tuple[Array, Array]:
    """Keys and values in float32 [..., slots, head_dim], without the residual window.

    For tests and requantizing; attention never does this.
    """
    f32 = jnp.float32
    if store.format == DENSE:
        return store.k.astype(f32), store.v.astype(f32)
    if store.format in EIGHT_BIT:
        k = store.k.astype(f32) * store.k_scale.astype(f32)[..., None]
        return k, store.v.astype(f32) * store.v_scale.astype(f32)[..., None]
    kc, vc = (unpack(x, PACKED_BITS[store.format]).astype(f32) for x in (store.k, store.v))
    ks, kz = (jnp.repeat(a.astype(f32), store.group, axis=-2) for a in (store.k_scale, store.k_zero))
    vs, vz = (
        jnp.repeat(jnp.swapaxes(a.astype(f32), -1, -2), store.group, axis=-1)
        for a in (store.v_scale, store.v_zero)
    )
    return kc * ks + kz, vc * vs + vz


def bytes_per_slot(format: str, head_dim: int, *, group: int = 64, meta_bytes: int | None = None) -> float:
    """Bytes of keys plus values of one slot of one KV head, scales included, residual window not.

    Args:
      format: one of `FORMATS`; "dense" counts 2 bytes an element.
      head_dim: channels.
      group: packed formats only.
      meta_bytes: of one scale or zero; default 4 (8 bits) or 2 (packed).
    """
    if format == DENSE:
        return 4.0 * head_dim
    if format in EIGHT_BIT:
        return 2.0 * (head_dim + (4 if meta_bytes is None else meta_bytes))
    meta = 2 if meta_bytes is None else meta_bytes
    return 2.0 * head_dim * (PACKED_BITS[format] / 8 + 2 * meta / group)
