"""A subject's LoRA, trained as DreamMix does (section 3.3) on the user's own MODEL, and written in the host's own format."""
