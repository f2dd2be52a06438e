"""The benchmark behind ``fused-po bench``: cases, methods and peers, the accuracy check, floors, results as JSON."""
