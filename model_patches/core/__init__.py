"""The protocol between methods and the host's sampling, and what every method needs of it. Names no method."""
