"""Measurements of the operation: `make bench`. Tests never import them."""
