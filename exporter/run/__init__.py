"""`wanexport run`."""
