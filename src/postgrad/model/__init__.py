"""Models: load, adapt, attend, generate, export."""
