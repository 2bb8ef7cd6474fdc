"""Forms, problem and program: what is solved, in plain arrays. No torch."""
