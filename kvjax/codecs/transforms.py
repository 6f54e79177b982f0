"""Invertible maps of channels that make vectors easier to quantize. All keep dot products, up to float rounding."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


@functools.cache
def hadamard_matrix(dim: int, seed: int = 0) -> np.ndarray:
    """f32 [dim, dim] orthogonal: a Hadamard matrix / sqrt(dim) after random signs; row vectors x @ H.

    ValueError unless dim is a power of two. seed -1: no signs.
    """
    if dim < 1 or dim & (dim - 1):
        raise ValueError(f"a Hadamard rotation needs a power of two of channels, head_dim={dim} is none")
    h = np.ones((1, 1), np.float32)
    while h.shape[0] < dim:
        h = np.block([[h, h], [h, -h]])
    signs = np.ones(dim) if seed < 0 else np.random.default_rng(seed).choice([-1.0, 1.0], dim)
    return (signs[:, None] * h / np.sqrt(dim)).astype(np.float32)


@functools.cache
def haar_matrix(dim: int, seed: int = 0) -> np.ndarray:
    """f32 [dim, dim], uniformly distributed orthogonal: QR of a Gaussian with the signs of R fixed."""
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((dim, dim)))
    return (q * np.sign(np.diag(r))).astype(np.float32)


def turn(x: Array, matrix: Array | np.ndarray, *, inverse: bool = False) -> Array:
    """x [..., dim] @ an orthogonal matrix [dim, dim] (or its transpose), in full f32 precision."""
    m = jnp.asarray(matrix)
    return jnp.matmul(x, m.T if inverse else m, precision=jax.lax.Precision.HIGHEST)


def hadamard(x: Array, seed: int = 0, *, inverse: bool = False) -> Array:
    """Random signs, then Hadamard, over the last axis."""
    return turn(x, hadamard_matrix(x.shape[-1], seed), inverse=inverse)


def rope(x: Array, pos: Array, inv_freq: Array, *, inverse: bool = False) -> Array:
    """Apply RoPE to x [..., n, dim] at pos int32 [..., n], or undo it; empty slots (-1) count as position 0.

    Channel i pairs with channel i + rotary_dim/2; channels past rotary_dim stay.
    """
    angle = jnp.maximum(pos, 0)[..., None].astype(jnp.float32) * inv_freq
    cos, sin = jnp.cos(angle), jnp.sin(angle) * (-1.0 if inverse else 1.0)
    half = inv_freq.shape[0]
    a, b, rest = jnp.split(x.astype(jnp.float32), [half, 2 * half], axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)
