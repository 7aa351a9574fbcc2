"""The coordinator's side."""

from weft.server.flower.app import app

__all__ = ["app"]
