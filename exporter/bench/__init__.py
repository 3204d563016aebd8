"""`wanexport bench`."""
