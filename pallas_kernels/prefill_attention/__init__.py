"""Attention of a prompt: causal, windowed, packed, block-sparse."""

from pallas_kernels.prefill_attention import block_table
from pallas_kernels.prefill_attention.block_table import BlockTable
from pallas_kernels.prefill_attention.ops import prefill_attention
from pallas_kernels.prefill_attention.shared import shared_attention

__all__ = ["BlockTable", "block_table", "prefill_attention", "shared_attention"]
