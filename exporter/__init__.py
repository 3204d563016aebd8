"""Ahead-of-time compilation of Wan checkpoints into bundles, and the command line."""
