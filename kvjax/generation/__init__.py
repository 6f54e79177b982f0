"""Prefill and decode loops over an explicit cache."""
