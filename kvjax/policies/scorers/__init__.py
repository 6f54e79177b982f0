"""Scorers: how important is each stored entry?"""
