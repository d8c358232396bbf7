"""The algorithms, as patches on the host's ModelPatcher, samplers and attention. No node classes here."""
