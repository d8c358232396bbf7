"""What each stage trains: its networks, data and loss."""
