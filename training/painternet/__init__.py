"""Trains a control branch."""
