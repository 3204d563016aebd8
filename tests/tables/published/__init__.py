"""The scripts of docs/published_optimisations.md: each is one section of the page."""
