"""A node's side: hands each message to the node's resident trainer."""

from weft.client.flower.app import app

__all__ = ["app"]
