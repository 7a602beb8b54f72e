"""Training: one loop, objectives, schedule, stopping, checkpoints, pre-flight."""
