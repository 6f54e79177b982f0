"""kvjax: explicit, compressible KV caches for LLM inference in JAX.

`kvjax.policies` turns a policy spec into parts, `kvjax.cache` holds the cache pytrees, `kvjax.generation`
the prefill and decode loops, `kvjax.sharding` the rules that spread all of it over a mesh.
"""
