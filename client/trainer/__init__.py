"""Training of a path's modules over a resident base."""
