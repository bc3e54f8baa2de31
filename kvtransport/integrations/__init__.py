"""What other programs see of kvtransport: one module for each, imported by who uses it, with an extra of its own.

Nothing here is imported by `import kvtransport`.
"""
