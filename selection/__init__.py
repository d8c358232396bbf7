"""Segmenters and detectors under the host's memory manager. They patch no model."""
