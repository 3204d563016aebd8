"""`wanexport profile`."""
