"""A bound made for channel programs: counts exactly, units by a semidefinite relaxation (count-lifted QCR)."""
