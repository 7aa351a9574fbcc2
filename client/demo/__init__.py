"""The demonstration: its corpus, its base, and the command that runs the whole loop on one machine."""
