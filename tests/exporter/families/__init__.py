"""Families that only tests know."""
