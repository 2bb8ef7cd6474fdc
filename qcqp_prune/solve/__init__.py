"""Solving: the contract that a backend keeps, what it hands back, and the checks that nothing escapes."""
