"""Rewrites of programs that are not ours: the same values, without what makes a graph slow."""
