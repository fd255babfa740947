"""The one time limit of the tests."""

PATIENCE = 1800
"""Seconds after which a test counts as hung.

No verdict may depend on how fast the machine is or on what else runs there. A limit is only there
to end a test that hangs: tests wait for an event, and give this as the longest time.
"""
