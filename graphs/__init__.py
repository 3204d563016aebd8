"""The Wan diffusion transformer as a static, sync-free graph, and the checkpoints it comes from."""
