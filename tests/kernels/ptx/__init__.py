"""A machine that executes the PTX of nvcc and Triton in numpy, for tests: see ``machine``."""
