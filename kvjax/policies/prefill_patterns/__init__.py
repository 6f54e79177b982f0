"""Prefill patterns: which key blocks the queries of a prompt read."""
