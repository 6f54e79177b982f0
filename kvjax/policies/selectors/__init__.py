"""Selectors: which stored entries a decode step reads. Contract: `kvjax.policies.selectors.base`."""
