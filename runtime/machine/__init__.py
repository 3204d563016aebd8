"""What the machine has: memory, a folder for temporary files."""
