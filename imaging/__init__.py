"""Masks and pictures in plain torch. Imports nothing of the host."""
