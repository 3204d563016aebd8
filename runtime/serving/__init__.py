"""Requests: prompts to videos."""
