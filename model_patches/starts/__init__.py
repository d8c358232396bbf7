"""What a run begins with: the best of several noises, or a noise that was made better."""
