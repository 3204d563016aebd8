"""What a graph must not contain."""
