"""Exact reformulations of a program for solvers of other problem classes, one per file."""
