"""How expectations around w* answer to a change of the data: losses one by one, their covariances, Gaussian nulls."""
