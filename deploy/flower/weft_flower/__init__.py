"""A run of Weft on Flower."""
