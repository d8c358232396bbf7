"""Training of the demo models: a synthetic world, small models in the host's classes, and the loops that fit them."""
