"""Support code for the tests: the host, random checkpoints, literal oracles."""
