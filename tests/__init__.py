"""The tests are one package, so that what they share is imported once, as `tests.conftest`."""
