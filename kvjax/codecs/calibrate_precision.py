"""Search of bits per layer for KVTuner: the least expected damage under a cap on the mean bits."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.codecs.quantizers import Affine

CHOICES = (2, 4, 8)


def damage(samples: dict[str, np.ndarray], channels: int = 0) -> np.ndarray:
    """f64 [layers, 2 (keys, values), choices]: E[(g . e)^2] of the rounding error e, g the importance gradient.

    samples: from `calibrate_capture.collect`. Keys are rounded before RoPE here, where the samples are.
    """
    layers = samples["k"].shape[0]
    out = np.zeros((layers, 2, len(CHOICES)))
    for j, bits in enumerate(CHOICES):
        part = Affine(bits, channels)
        run = jax.jit(lambda x, part=part: part.decode(part.encode(x), x.shape[-1]) - x)
        for layer in range(layers):
            for s, side in enumerate("kv"):
                error = run(jnp.asarray(samples[side][layer], jnp.float32)[None])[0]
                cost = jnp.sum(error * jnp.asarray(samples["g" + side][layer], jnp.float32), axis=-1)
                out[layer, s, j] = float(jnp.mean(cost * cost))
    return out


def search(costs: np.ndarray, cap: float) -> np.ndarray:
    """int32 [layers, 2] bits with mean at most `cap`, starting at the fewest and raising where a bit saves most."""
    index = np.zeros(costs.shape[:2], int)
    bits = np.asarray(CHOICES)
    if cap < bits[0]:
        raise ValueError(f"a mean of {cap} bits is below the least choice, {bits[0]}")
    while True:
        used, best, where = bits[index].mean(), 0.0, None
        for at in np.ndindex(*index.shape):
            for up in range(index[at] + 1, len(bits)):
                more = bits[up] - bits[index[at]]
                if used + more / index.size > cap + 1e-9:
                    continue
                gain = (costs[at][index[at]] - costs[at][up]) / more
                if gain > best:
                    best, where = gain, (at, up)
        if where is None:
            return bits[index].astype(np.int32)
        index[where[0]] = where[1]


def precision(samples: dict[str, np.ndarray], caps: Sequence[float] = (3, 4, 5)) -> dict[str, np.ndarray]:
    """Arrays of a calibration file for `PerLayer`: bits_CAP [layers, 2] for every cap."""
    costs = damage(samples)
    return {f"bits_{cap:g}": search(costs, cap) for cap in caps}
