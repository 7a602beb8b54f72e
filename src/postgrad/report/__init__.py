"""Report: what a run directory says, as one self-contained page and a model card. No torch."""
