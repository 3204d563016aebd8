"""What executes an engine: one file a backend."""
