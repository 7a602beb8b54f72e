"""The embedded example: licence notices to SPDX expressions on a 135M model, from PyPI alone."""
