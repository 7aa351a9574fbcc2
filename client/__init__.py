"""The worker and the commands that talk to a coordinator."""
