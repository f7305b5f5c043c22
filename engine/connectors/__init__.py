"""The connectors: sources of physical memory, one file each; none imports another."""
