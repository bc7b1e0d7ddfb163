"""SGMCMC kernels, one a file: the formula, its stability bound and its bias."""
