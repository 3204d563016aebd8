"""Files of a bundle, and reading them."""
