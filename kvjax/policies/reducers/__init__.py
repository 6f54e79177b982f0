"""Reducers: what happens to the entries that lose their place?"""
