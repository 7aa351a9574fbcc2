"""What the coordinator and the worker share."""
