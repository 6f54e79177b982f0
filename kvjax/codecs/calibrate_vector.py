"""Calibration of vector codes: a map of the channels, how many codes each layer gets, and the codebooks.

Errors are weighted by importance: with g the gradient at a key or value, an error e costs E[(g . e)^2] = e^T M e,
M = E[g g^T]. In the basis in which M is the identity and the samples are uncorrelated, the cost is the plain
squared error, directions are sorted by what they contribute, and costs of all layers add up. So the codes go
where the next one saves most, over groups of neighbouring directions; k-means then finds the codewords.
"""

from __future__ import annotations

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


def kmeans(y: np.ndarray, weight: np.ndarray, words: int, loops: int, rng: np.random.Generator) -> np.ndarray:
    """Codewords f32 [words, size] of samples y [n, size] with weights [n] (Lloyd)."""
    y = y.astype(np.float32)
    n, size = y.shape
    distinct = min(words, n)
    book = y[rng.choice(n, distinct, replace=False, p=weight / weight.sum())]
    book = np.concatenate([book, np.zeros((words - distinct, size), np.float32)])
    ones = np.concatenate([y, np.ones((n, 1), np.float32)], axis=1) * weight[:, None].astype(np.float32)
    for _ in range(loops):
        owner = np.argmax(y @ book.T - (book * book).sum(1) / 2, axis=1)
        sums = np.stack([np.bincount(owner, ones[:, i], minlength=words) for i in range(size + 1)], axis=1)
        used = sums[:, -1] > 0
        book[used] = (sums[used, :-1] / sums[used, -1:]).astype(np.float32)
        if not used.all():  # an unused codeword restarts next to a heavy one
            heavy = rng.choice(words, (~used).sum(), p=sums[:, -1] / sums[:, -1].sum())
            book[~used] = book[heavy] + 1e-3 * y.std(0) * rng.standard_normal((len(heavy), size))
    return book


def vector_codes(
    samples: dict[str, np.ndarray],
    bits_per_element: float,
    *,
    code_bits: int = 8,
    loops: int = 12,
    most: int = 40,
    power: float = 0.5,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Arrays of a calibration file for `Vector`, from `calibrate_capture.collect`'s samples.

    bits_per_element: mean over layers, keys and values; each layer's share follows from what its codes save.
    power: samples weigh |g|^(2 power) in k-means.
    """
    rng = np.random.default_rng(seed)
    layers, heads, _, dim = samples["k"].shape
    tensors = [(side, layer) for layer in range(layers) for side in "kv"]
    bases, costs, sizes = {}, [], []
    for side, layer in tensors:
        basis = [
            importance_basis(samples[side][layer, h], samples["g" + side][layer, h]) for h in range(heads)
        ]
        bases[side, layer] = basis
        cost, groups = partitions(np.mean([b[3] for b in basis], axis=0), code_bits, most)
        costs.append(cost)
        sizes.append(groups)
    total = round(bits_per_element * dim / code_bits * len(tensors))
    counts = allocate(costs, total)
    out: dict[str, np.ndarray] = {}
    for (side, layer), count, groups in zip(tensors, counts, sizes):
        chosen = groups[count]
        books = []
        for h, (mean, into, _, _) in enumerate(bases[side, layer]):
            y = (samples[side][layer, h].astype(np.float64) - mean) @ into
            g = samples["g" + side][layer, h].astype(np.float64)
            weight = (g * g).sum(1)
            weight = (weight / (weight.mean() + 1e-30)) ** power + 0.1
            ends = np.cumsum(chosen)
            parts = [
                kmeans(y[:, e - s : e], weight, 2**code_bits, loops, rng)
                for s, e in zip(chosen, ends, strict=True)
            ]
            books.append(np.concatenate(parts, axis=1))
        # float16 holds the basis only if it is scaled: fold a common factor into the codewords.
        key = f"{side}.{layer}"
        stack = [np.stack([b[i] for b in bases[side, layer]]) for i in range(3)]
        gain = 1.0 / np.abs(stack[1]).max()
        out[f"{key}.sizes"] = np.asarray(chosen, np.int32)
        out[f"{key}.mean"] = stack[0].astype(np.float16)
        out[f"{key}.into"] = (stack[1] * gain).astype(np.float32)
        out[f"{key}.back"] = (stack[2] / gain).astype(np.float32)
        out[f"{key}.book"] = (np.stack(books) * gain).astype(np.float16)
    return out
