"""Allocators: how many entries does each layer and KV head keep?"""
