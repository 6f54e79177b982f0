"""Calibration of non-uniform levels (KVQuant, arXiv 2401.18079): thresholds per channel, levels per layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

OUTLIERS = 0.01


def weighted_levels(x: np.ndarray, weight: np.ndarray, count: int, loops: int = 50) -> np.ndarray:
    """Weighted one-dimensional k-means of x [n]: `count` ascending levels."""
    order = np.argsort(x)
    x, weight = x[order].astype(np.float64), weight[order].astype(np.float64) + 1e-12
    mass = np.concatenate([[0], np.cumsum(weight)])
    moment = np.concatenate([[0], np.cumsum(weight * x)])
    share = (np.arange(count) + 0.5) / count * mass[-1]
    levels = x[np.clip(np.searchsorted(mass[1:], share), 0, len(x) - 1)]
    for _ in range(loops):
        edges = np.concatenate([[0], np.searchsorted(x, (levels[1:] + levels[:-1]) / 2), [len(x)]])
        m = mass[edges[1:]] - mass[edges[:-1]]
        levels = np.where(m > 0, (moment[edges[1:]] - moment[edges[:-1]]) / np.maximum(m, 1e-30), levels)
        levels = np.sort(levels)
    return levels


def _matched(levels: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Q-Norm: levels moved so that mean and deviation after quantization are those before."""
    owner = np.searchsorted((levels[1:] + levels[:-1]) / 2, x)
    after = levels[owner]
    gain = x.std() / max(after.std(), 1e-12)
    return levels * gain + x.mean() - after.mean() * gain


def levels(samples: dict[str, np.ndarray], bits: Sequence[int] = (2, 3, 4)) -> dict[str, np.ndarray]:
    """Arrays of a calibration file for `Table`, from `calibrate_capture.collect`'s samples.

    Per layer and head: centre and half range of every key channel (percentiles that leave out OUTLIERS), and 2^b
    levels in units of the half range for keys and for values (normalised per token), by k-means weighted with the
    squared gradient over what is no outlier. 2 bits: Q-Norm.
    """
    out: dict[str, np.ndarray] = {}
    layers, heads = samples["k"].shape[:2]
    for layer in range(layers):
        for side in "kv":
            axis = 0 if side == "k" else 1
            found: dict[str, list] = {"centre": [], "half": [], **{f"levels{b}": [] for b in bits}}
            for h in range(heads):
                x = samples[side][layer, h].astype(np.float64)
                g = samples["g" + side][layer, h].astype(np.float64)
                low, high = np.quantile(x, [OUTLIERS / 2, 1 - OUTLIERS / 2], axis=axis, keepdims=True)
                centre, half = (high + low) / 2, np.maximum((high - low) / 2, 1e-6)
                y = (x - centre) / half
                inside = np.abs(y) <= 1
                for b in bits:
                    table = weighted_levels(y[inside], (g * g)[inside], 2**b)
                    found[f"levels{b}"].append(_matched(table, y[inside]) if b == 2 else table)
                if side == "k":
                    found["centre"].append(centre[0])
                    found["half"].append(half[0])
            for name, parts in found.items():
                if parts:
                    out[f"{side}.{layer}.{name}"] = np.stack(parts).astype(np.float32)
    return out
