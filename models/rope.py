"""Rotary position embedding: the frequencies of every scaling rule, and the rotation itself.

Channels `i` and `i + head_dim // 2` form a pair, as in the Hugging Face layout. A model that rotates part
of each head (`rotary_dim < head_dim`) has its query and key channels permuted when it is loaded, so that this
holds for it too: the channels left alone have frequency 0.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

KINDS = ("default", "linear", "llama3", "yarn", "longrope")


@dataclasses.dataclass(frozen=True)
class Rope:
    """One rule for RoPE frequencies. Hashable; lengths in tokens.

    Sources: linear (Position Interpolation, arXiv 2306.15595), yarn (arXiv 2309.00071), longrope (arXiv
    2402.13753), llama3 (the Llama 3.1 release).
    """

    theta: float
    rotary_dim: int  # channels of a head that are rotated
    kind: str = "default"
    factor: float = 1.0
    original_context: int = 0  # context of the pre-training, before the extension
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: whole channels bound the ramp
    amplitude: float = 1.0  # yarn, longrope: factor on cos and sin
    short_factor: tuple[float, ...] = ()  # longrope, context <= original_context
    long_factor: tuple[float, ...] = ()  # longrope, longer contexts

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"rope kind {self.kind!r} is not supported; supported: {', '.join(KINDS)}")
        if self.rotary_dim % 2:
            raise ValueError(f"rotary_dim={self.rotary_dim} is not even")
        if self.kind == "longrope":
            for name in ("short_factor", "long_factor"):
                found = len(getattr(self, name))
                if found != self.rotary_dim // 2:
                    raise ValueError(f"longrope {name} has {found} entries, expected {self.rotary_dim // 2}")


def from_hf(parameters: dict[str, Any], *, theta: float, rotary_dim: int, max_context: int) -> Rope:
    """`Rope` from a Hugging Face `rope_scaling` / `rope_parameters` dictionary (empty: default RoPE).

    Raises ValueError if the kind is not supported.
    """
    p = parameters
    kind = p.get("rope_type", p.get("type", "default"))
    theta = float(p.get("rope_theta", theta))
    original = int(p.get("original_max_position_embeddings") or max_context)
    factor = float(p.get("factor") or max_context / original)
    common: dict[str, Any] = dict(theta=theta, rotary_dim=rotary_dim, kind=kind)
    if kind == "linear":
        common.update(factor=factor)
    elif kind == "llama3":
        common.update(
            factor=factor,
            original_context=original,
            low_freq_factor=float(p["low_freq_factor"]),
            high_freq_factor=float(p["high_freq_factor"]),
        )
    elif kind == "yarn":
        common.update(
            factor=factor,
            original_context=original,
            beta_fast=float(p.get("beta_fast") or 32),
            beta_slow=float(p.get("beta_slow") or 1),
            truncate=bool(p.get("truncate", True)),
            amplitude=_yarn_amplitude(p, factor),
        )
    elif kind == "longrope":
        amplitude = p.get("attention_factor")
        if amplitude is None:
            amplitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        common.update(
            original_context=original,
            amplitude=float(amplitude),
            short_factor=tuple(map(float, p["short_factor"])),
            long_factor=tuple(map(float, p["long_factor"])),
        )
    return Rope(**common)


def _yarn_amplitude(p: dict[str, Any], factor: float) -> float:
    """Factor on cos and sin under yarn, with DeepSeek's two `mscale` variants."""
    if p.get("attention_factor") is not None:
        return float(p["attention_factor"])

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if p.get("mscale") and p.get("mscale_all_dim"):
        return mscale(float(p["mscale"])) / mscale(float(p["mscale_all_dim"]))
    return mscale(1.0)


def inv_freq(rope: Rope, head_dim: int, max_context: int) -> np.ndarray:
    """f32 [head_dim // 2]: radians per token of each channel pair, 0 where a pair is not rotated.

    `max_context` picks longrope's factors once for a run: one cache never mixes two sets of frequencies.
    """
    half = rope.rotary_dim // 2
    exponent = np.arange(0, rope.rotary_dim, 2, dtype=np.float32) / np.float32(rope.rotary_dim)
    freq = 1.0 / np.power(np.float32(rope.theta), exponent)
    if rope.kind == "linear":
        freq = freq / np.float32(rope.factor)
    elif rope.kind == "llama3":
        freq = _llama3(rope, freq)
    elif rope.kind == "yarn":
        freq = _yarn(rope, freq)
    elif rope.kind == "longrope":
        extended = max_context > rope.original_context
        freq = freq / np.asarray(rope.long_factor if extended else rope.short_factor, np.float32)
    out = np.zeros(head_dim // 2, np.float32)
    out[:half] = freq
    return out


def _llama3(rope: Rope, freq: np.ndarray) -> np.ndarray:
    """Long wavelengths are divided by `factor`, short ones kept, those between blended."""
    wavelength = 2 * math.pi / freq
    low = rope.original_context / rope.low_freq_factor
    high = rope.original_context / rope.high_freq_factor
    smooth = (rope.original_context / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - smooth) * freq / rope.factor + smooth * freq
    scaled = np.where(wavelength > low, freq / rope.factor, freq)
    return np.where((wavelength <= low) & (wavelength >= high), blended, scaled).astype(np.float32)


def _yarn(rope: Rope, freq: np.ndarray) -> np.ndarray:
    """Channels that turn often are kept, those that turn rarely interpolated, with a linear ramp between."""
    dim = rope.rotary_dim

    def channel(rotations: float) -> float:
        ratio = rope.original_context / (rotations * 2 * math.pi)
        return dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = channel(rope.beta_fast), channel(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = high - low if high != low else 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / span, 0, 1)
    return (freq / rope.factor * ramp + freq * (1 - ramp)).astype(np.float32)


def cos_sin(rope: Rope, frequencies: np.ndarray, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """f32 (cos, sin), each [batch, 1, tokens, head_dim // 2], of int32 `positions` [batch, tokens]."""
    angle = jnp.maximum(positions, 0).astype(jnp.float32)[:, None, :, None] * frequencies
    amplitude = np.where(np.arange(frequencies.size) < rope.rotary_dim // 2, rope.amplitude, 1.0)
    amplitude = amplitude.astype(np.float32)
    # The barrier stops XLA from fusing, and so recomputing, the table in every layer: 20% of a step on a CPU.
    return jax.lax.optimization_barrier((jnp.cos(angle) * amplitude, jnp.sin(angle) * amplitude))


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates x [batch, heads, tokens, head_dim] in float32; returns x's dtype."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def channel_order(head_dim: int, rotary_dim: int) -> np.ndarray:
    """int [head_dim]: `w[..., order]` moves a partly rotated head's pairs to `(i, i + head_dim // 2)`."""
    turn, rest = rotary_dim // 2, (head_dim - rotary_dim) // 2
    channels = np.arange(head_dim)
    still = channels[rotary_dim:]
    return np.concatenate([channels[:turn], still[:rest], channels[turn:rotary_dim], still[rest:]])
