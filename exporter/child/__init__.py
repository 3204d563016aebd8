"""Processes that a command starts, and their temporary folders."""
