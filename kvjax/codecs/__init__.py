"""Codecs: how surviving keys and values are stored."""
