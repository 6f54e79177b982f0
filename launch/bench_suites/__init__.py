"""Benchmark suites: each module has `rows()`, an iterator of result rows."""
