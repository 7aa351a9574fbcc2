"""The commands of this side, by who types them."""
