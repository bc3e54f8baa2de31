"""Memory: what blocks look like and where they lie. Pure arithmetic over (layouts, arrays); moves no byte.

Invariant: imports nothing of the package but `types`, `config` and `errors`; only `pool` knows the extension.
"""
