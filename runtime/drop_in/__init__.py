"""An engine in the place of another pipeline's transformer."""
