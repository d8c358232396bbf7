"""Readers for the files of networks."""
