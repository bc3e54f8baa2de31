"""The parts of examples/prefill_decode.py: the model, its paged KV cache, the two processes, the checks."""
