"""The peers, NIXL and Mooncake, moving the same work between two processes, in a venv of their own
(setup.py makes it).
"""
