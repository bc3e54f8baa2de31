"""The bench: the work W between two real processes, against raw limits and against the peers."""
