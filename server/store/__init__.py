"""The coordinator's durable record."""
