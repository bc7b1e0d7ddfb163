"""What a run's events say together: transitions, stages, phase types, and what speaks for and against them."""
