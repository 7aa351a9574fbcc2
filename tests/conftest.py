"""Settings of all tests."""

from hypothesis import settings

# The first call of a compiled loop takes a second, whatever the example: no test is timed.
settings.register_profile("weft", settings.default, deadline=None)
settings.load_profile("weft")
