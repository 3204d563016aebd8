"""What a profiler recorded of a few steps, and what it says: kinds, waits, gaps, floors."""
