"""`wanexport compare`."""
