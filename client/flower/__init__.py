"""A worker behind Flower: what a SuperNode runs hands each message to a resident trainer on the same machine."""
