"""What other programs read: a recipe's test set as a task of lm-evaluation-harness."""
