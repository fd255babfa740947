"""Measurements of the operation: `make bench`. Tests compare what README says with them."""
