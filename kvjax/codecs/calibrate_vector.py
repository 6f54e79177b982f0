"""Calibration of vector codes: a map of the channels, how many codes each layer gets, and the codebooks.

Errors are weighted by importance: with g the gradient at a key or value, an error e costs E[(g . e)^2] = e^T M e,
M = E[g g^T]. In the basis in which M is the identity and the samples are uncorrelated, the cost is the plain
squared error, directions are sorted by what they contribute, and costs of all layers add up. So the codes go
where the next one saves most, over groups of neighbouring directions; k-means then finds the codewords.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def importance_basis(x: np.ndarray, g: np.ndarray, ridge: float = 0.02) -> tuple[np.ndarray, ...]:
    """(mean [d], into [d, d], back [d, d], spectrum [d] descending) from samples x and gradients g [n, d].

    y = (x - mean) @ into has uncorrelated coordinates with variances `spectrum`, in which |y - y'|^2 is the
    expected cost of an error. `ridge` of the mean importance is added to every direction.
    """
    x, g = x.astype(np.float64), g.astype(np.float64)
    mean = x.mean(0)
    m = g.T @ g / len(g)
    m += (ridge * np.trace(m) / len(m) + 1e-30) * np.eye(len(m))
    value, vector = np.linalg.eigh(m)
    root = vector * np.sqrt(value) @ vector.T
    y = (x - mean) @ root
    spectrum, turn = np.linalg.eigh(y.T @ y / len(y))
    order = np.argsort(-spectrum)
    turn = turn[:, order]
    back = turn.T @ (vector / np.sqrt(value) @ vector.T)
    return mean, root @ turn, back, np.maximum(spectrum[order], 0)


def gaussian_cost(variances: np.ndarray, bits: float) -> float:
    """Least total squared error of independent Gaussians with `bits` bits for all of them (reverse water-filling)."""
    v = np.maximum(variances, 1e-300)
    for n in range(len(v), 0, -1):
        level = np.exp(np.mean(np.log(v[:n])) - 2 * np.log(2) * bits / n)
        if level <= v[n - 1] or n == 1:
            return float(n * min(level, v[0]) + v[n:].sum())
    return float(v.sum())


def partitions(spectrum: np.ndarray, bits: int, most: int) -> tuple[np.ndarray, list[list[int]]]:
    """(cost [most + 1], group sizes for each number of codes), groups of neighbours in a descending spectrum."""
    d = len(spectrum)
    cost = np.full((d + 1, d + 1), np.inf)
    for a in range(d):
        for b in range(a + 1, d + 1):
            cost[a, b] = gaussian_cost(spectrum[a:b], bits)
    best = np.full((most + 1, d + 1), np.inf)
    came = np.zeros((most + 1, d + 1), int)
    best[0, 0] = 0.0
    for m in range(1, most + 1):
        total = best[m - 1][:, None] + cost  # [start, end]
        came[m], best[m] = total.argmin(0), total.min(0)
    out = [float(spectrum.sum())]
    sizes: list[list[int]] = [[d]]
    for m in range(1, most + 1):
        out.append(best[m, d])
        ends, at = [d], d
        for k in range(m, 0, -1):
            at = came[k, at]
            ends.append(at)
        sizes.append(np.diff(ends[::-1]).tolist() if np.isfinite(best[m, d]) else [])
    return np.asarray(out), sizes


def allocate(costs: list[np.ndarray], total: int, least: int = 1) -> list[int]:
    """Codes per tensor: start with `least` each, then give the next code where it saves most, `total` in all."""
    counts = [least] * len(costs)
    for _ in range(total - least * len(costs)):
        # A single code may help little and the next one much: look at the best average saving ahead.
        def gain(i: int) -> float:
            c, left = costs[i], costs[i][counts[i]]
            steps = np.arange(1, min(5, len(c) - counts[i]))
            return float(np.max((left - c[counts[i] + steps]) / steps)) if len(steps) else -np.inf

        counts[int(np.argmax([gain(i) for i in range(len(costs))]))] += 1
    return counts


@functools.partial(jax.jit, static_argnames=("words", "loops"))
def kmeans(y: jax.Array, weight: jax.Array, key: jax.Array, words: int, loops: int) -> jax.Array:
    """Codewords f32 [words, size] of samples y [n, size] with weights [n] (Lloyd); n >= words."""
    first, *keys = jax.random.split(key, loops + 1)
    book = y[jax.random.choice(first, y.shape[0], (words,), replace=False, p=weight / weight.sum())]

    def step(book: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
        dots = jnp.matmul(y, book.T, precision=jax.lax.Precision.HIGHEST)
        owner = jnp.argmax(dots - jnp.sum(book * book, axis=1) / 2, axis=1)
        mass = jax.ops.segment_sum(weight, owner, words)
        mean = jax.ops.segment_sum(y * weight[:, None], owner, words) / jnp.maximum(mass, 1e-20)[:, None]
        # A codeword that nobody uses starts again at a random sample.
        again = y[jax.random.randint(key, (words,), 0, y.shape[0])]
        return jnp.where((mass > 0)[:, None], mean, again), None

    return jax.lax.scan(step, book, jnp.stack(keys))[0]


def _codebook(y: np.ndarray, weight: np.ndarray, sizes: list[int], key: jax.Array, words: int, loops: int):
    """Codewords [words, d] of all groups of y [n, d], side by side."""
    parts, end = [], 0
    for n, size in enumerate(sizes):
        end += size
        width = 1 << (size - 1).bit_length()  # few distinct shapes, so that few programs are compiled
        padded = np.zeros((len(y), width), np.float32)
        padded[:, :size] = y[:, end - size : end]
        parts.append(kmeans(padded, weight, jax.random.fold_in(key, n), words, loops)[:, :size])
    return np.concatenate([np.asarray(p) for p in parts], axis=1)


def compact(book: np.ndarray) -> dict[str, np.ndarray]:
    """Codewords [kv_heads, words, d] as int8 with a float16 scale per head and channel: what a file holds."""
    scale = np.maximum(np.abs(book).max(1), 1e-6).astype(np.float16)
    return {"book": np.rint(book / scale[:, None] * 127).astype(np.int8), "scale": scale}


def vector_codes(
    samples: dict[str, np.ndarray],
    rates: Sequence[float],
    *,
    code_bits: int = 8,
    loops: int = 12,
    most: int = 64,
    power: float = 0.5,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Arrays of a calibration file for `Vector`, from `calibrate_capture.collect`'s samples.

    rates: bits per element, mean over layers, keys and values; each layer's share follows from what its codes
    save. The file holds the map of the channels once and a codebook per rate. power: samples weigh |g|^(2 power)
    in k-means.
    """
    layers, heads, _, dim = samples["k"].shape
    key, out = jax.random.key(seed), {}
    tensors = [(side, layer) for layer in range(layers) for side in "kv"]
    mapped, weights, costs, groups = {}, {}, [], []
    for side, layer in tensors:
        basis = [
            importance_basis(samples[side][layer, h], samples["g" + side][layer, h]) for h in range(heads)
        ]
        cost, sizes = partitions(np.mean([b[3] for b in basis], axis=0), code_bits, most)
        costs.append(cost)
        groups.append(sizes)
        gain = 1.0 / max(np.abs(b[1]).max() for b in basis)  # within the range of float16
        names = dict(zip(("mean", "into", "back"), (np.stack([b[i] for b in basis]) for i in range(3))))
        names["into"] *= gain
        names["back"] /= gain
        out |= {f"{side}.{layer}.{n}": x.astype(np.float16) for n, x in names.items()}
        x, g = (samples[p + side][layer].astype(np.float64) for p in ("", "g"))
        mapped[side, layer] = ((x - names["mean"][:, None]) @ names["into"]).astype(np.float32)
        weight = (g * g).sum(-1)
        weight = (weight / (weight.mean(-1, keepdims=True) + 1e-30)) ** power + 0.1
        weights[side, layer] = weight.astype(np.float32)
    for rate in rates:
        counts = allocate(costs, round(rate * dim / code_bits * len(tensors)))
        for i, (tensor, count) in enumerate(zip(tensors, counts)):
            sizes = groups[i][count]
            books = [
                _codebook(mapped[tensor][h], weights[tensor][h], sizes, jax.random.fold_in(key, i * heads + h),
                          2**code_bits, loops)
                for h in range(heads)
            ]  # fmt: skip
            name = f"{rate:g}.{tensor[0]}.{tensor[1]}"
            out[f"{name}.sizes"] = np.asarray(sizes, np.int32)
            out |= {f"{name}.{n}": x for n, x in compact(np.stack(books)).items()}
    return out
