"""What compiles a model: one folder a backend."""
