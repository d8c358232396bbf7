"""DreamMix (Yang et al.): a hole is filled in its surroundings first and in the whole picture afterwards, and attributes of a
subject can be taken out of a prompt."""
