"""What stands in the tree: one room for each kind of directory."""
