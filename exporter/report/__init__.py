"""`wanexport report`."""
