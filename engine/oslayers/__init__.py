"""The OS layers; none imports another."""
