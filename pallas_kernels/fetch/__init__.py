"""Blocks of host memory for a decode step: fetched over the link by few threads, while other kernels compute."""

from pallas_kernels.fetch.ops import fetch_blocks

__all__ = ["fetch_blocks"]
