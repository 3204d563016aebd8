"""LoRA files of every spelling, and merging them into weights."""
