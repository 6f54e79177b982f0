"""A precision per layer: static bits for keys and for values, from a file that a search wrote (KVTuner)."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from kvjax.codecs import vector
from kvjax.codecs.base import NO_CONTEXT, Codec, Context, Field, Store
from kvjax.codecs.quantizers import Affine, Pair
from kvjax.types import ModelShape

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class PerLayer(Codec):
    """Asymmetric codes per token over `group` channels (0: the head), integer zero; bits by layer.

    pairs: (key bits, value bits) of each layer, repeated if there are fewer than layers; or calibration, a file
    with the array `bits_CAP` [layers, 2].
    """

    pairs: tuple[tuple[int, int], ...] = ((4, 4),)
    group: int = 1
    channels: int = 0
    residual: int = 0
    sink: int = 0
    calibration: str = ""
    cap: float = 4

    def _pair(self, k_bits: int, v_bits: int) -> Pair:
        k, v = (
            Affine(b, self.channels, zero="int8") if b < 8 else Affine(8, self.channels)
            for b in (k_bits, v_bits)
        )
        return Pair(k, v, self.residual, self.sink)

    def for_layer(self, layer: int, shape: ModelShape) -> Codec:
        """The layer's `Pair`."""
        pairs = self.pairs
        if self.calibration:
            name = f"bits_{self.cap:g}"
            found = vector.open_file(self.calibration, shape)
            if name not in found:
                caps = sorted(n.removeprefix("bits_") for n in found)
                raise ValueError(
                    f"{self.calibration!r} has no precision for a mean of {self.cap:g} bits; it has {caps}"
                )
            pairs = tuple((int(k), int(v)) for k, v in found[name])
        return self._pair(*pairs[layer % len(pairs)])

    def fields(self, head_dim: int, dtype: str) -> dict[str, Field]:
        """Those of the first pair: what a model has depends on the layer."""
        return self._pair(*self.pairs[0]).fields(head_dim, dtype)

    def bits_per_element(self, head_dim: int, dtype: str) -> float:
        """The mean over the pairs."""
        return float(np.mean([self._pair(*p).bits_per_element(head_dim, dtype) for p in self.pairs]))

    def encode(self, k: Array, v: Array, ctx: Context = NO_CONTEXT) -> Store:
        """By the first pair; layers use `for_layer`."""
        return self._pair(*self.pairs[0]).encode(k, v, ctx)

    def decode(self, store: Store, dtype: str, ctx: Context = NO_CONTEXT) -> tuple[Array, Array]:
        """By the first pair; layers use `for_layer`."""
        return self._pair(*self.pairs[0]).decode(store, dtype, ctx)
