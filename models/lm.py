"""A configured decoder as the hashable `kvjax.generation.engine.LanguageModel` that the loops take."""

from __future__ import annotations

import dataclasses
from typing import Any

from kvjax.types import Array, AttendFn, ModelShape
from models import decoder
from models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class DecoderLM:
    """The model `config` with keys and values in `dtype` (None: the checkpoint's).

    weights: fingerprint of the parameters; calibration files of other weights are then refused.
    """

    config: ModelConfig
    dtype: str | None = None
    weights: str = ""

    @property
    def shape(self) -> ModelShape:
        """Layers, heads, windows, dtype."""
        return dataclasses.replace(self.config.shape(self.dtype), weights=self.weights)

    def hidden(
        self, params: Any, tokens: Array, positions: Array, cache: Any, attend: AttendFn
    ) -> tuple[Array, Any]:
        """See `decoder.hidden`."""
        return decoder.hidden(params, self.config, tokens, positions, cache, attend)

    def logits(self, params: Any, hidden: Array) -> Array:
        """f32 [..., vocab] of hidden [..., embed]."""
        if hidden.ndim == 2:
            return decoder.logits(params, self.config, hidden[:, None])[:, 0]
        return decoder.logits(params, self.config, hidden)
