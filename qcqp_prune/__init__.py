"""Prune a PyTorch network to an exact resource budget by solving a discrete optimisation problem."""
