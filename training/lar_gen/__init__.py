"""Training for LAR-Gen on the world's subjects: what sees them, and what puts them into a hole."""
