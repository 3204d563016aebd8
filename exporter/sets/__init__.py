"""The weights sets of a bundle: made, added, removed and listed."""
