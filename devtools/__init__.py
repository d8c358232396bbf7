"""The work behind dev.py: set-up, the host's process, its client, the demo."""
