"""The bench: methods x tasks x budgets x learning rates x seeds, one process a cell, and what comes of it."""
