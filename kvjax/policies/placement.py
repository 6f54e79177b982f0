"""The placement contract: in which memory a layer's entries live, and when what a step reads is fetched."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Offload:
    """Entries of the prompt live in host memory; the device holds the index, the newest entries and the blocks read last.

    A decode step moves the chosen blocks that the step before did not choose (`kvjax.cache.placing`). Layers that the
    selector skips, and layers with a sliding window, stay on the device. Without a selector every step moves everything.

    recent: newest entries of the prompt that stay on the device, beside those that the selector always reads.
    ahead: choose for the next layer with this layer's input, so that its fetch depends on nothing that is still to be
    computed (InfiniGen's speculation); it reads the next layer's query projection once more.
    """

    recent: int = 0
    ahead: bool = False

    def __post_init__(self) -> None:
        if self.recent < 0:
            raise ValueError(f"offload: recent cannot be negative, got {self.recent}")
