"""Rows in: read, check, split, render, pack."""
