"""Rows of the table that need a program of their own: one file each, the harness's half (`measure`) and the
worker's halves.
"""
