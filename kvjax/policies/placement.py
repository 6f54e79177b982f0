"""The placement contract: in which memory a layer's entries live, and when what a step reads is fetched."""

from __future__ import annotations

import dataclasses
from typing import Any

from kvjax.codecs.base import Plain
from kvjax.types import ModelShape

MEMORY = 1 << 28  # bytes of host memory for pages that were read from disk, unless said otherwise
PAGE = 16  # fewest slots of a page on disk


@dataclasses.dataclass(frozen=True)
class Offload:
    """Entries of the prompt live in host memory; the device holds the index, the newest entries and the blocks read last.

    A decode step moves the chosen blocks that the step before did not choose (`kvjax.cache.placing`). Layers that the
    selector skips, and layers with a sliding window, stay on the device. Without a selector every step moves everything.

    recent: newest entries of the prompt that stay on the device, beside those that the selector always reads.
    ahead: choose for the next layer with this layer's input (InfiniGen's speculation), so that its fetch waits for nothing
    that is still to be computed and runs beside this layer's MLP (on a GPU in a branch of the step's graph:
    `kvjax.generation.engine.decoder`); it reads the next layer's projections once more. Codecs with a window choose when
    the token is stored.
    disk: a directory; complete pages of the prompt then live in files there (`kvjax.cache.disk`), and host memory holds
    up to `memory` bytes of those that were read last, all layers and rows together. keep: leave the files when the cache
    is released.
    """

    recent: int = 0
    ahead: bool = False
    disk: str = ""
    memory: int = MEMORY
    keep: bool = False

    def __post_init__(self) -> None:
        if self.recent < 0:
            raise ValueError(f"offload: recent cannot be negative, got {self.recent}")
        if not isinstance(self.disk, str):
            raise ValueError(f"offload: disk is the name of a directory, got {self.disk!r}")
        if isinstance(self.memory, bool) or not isinstance(self.memory, int) or self.memory < 0:
            raise ValueError(f"offload: memory is a number of bytes, 0 or more, got {self.memory!r}")

    def check(self, policy: Any, shape: ModelShape) -> None:
        """ValueError for parts of `policy` that offload does not compose with."""
        excluded = {
            "heads of different sizes (a Ragged cache)": policy.compresses and policy.allocator.ragged,
            "a codec that predicts a layer from the one before": policy.codec.for_layer(1, shape).predicts,
            "eviction while decoding": policy.compresses and policy.evict_decode,
            "a probe": policy.probe is not None,
            f"a codec, where {type(policy.selector).__name__} keeps keys in a form of its own": policy.selector
            is not None
            and bool(policy.selector.supplies)
            and policy.codec != Plain(),
        }
        for what, present in excluded.items():
            if present:
                raise ValueError(f"{policy.name}: offload does not compose with {what}")
