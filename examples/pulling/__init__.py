"""The parts of examples/pull_connector.py that aren't the connector: a stand-in for an engine, and the checks."""
