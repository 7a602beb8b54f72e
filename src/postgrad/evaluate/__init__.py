"""Evaluation: arms on the same rows, evidence per row, intervals, paired comparison, verdict."""
