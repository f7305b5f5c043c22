"""What stands in the tree: one room for each kind of directory, `files` for what stands in them.

To add a file to a directory, write a module with one function for it, decorated with the `Entries` object of
the directory (all stand in `contexts`, an example in `cloudfs.entries`), and name the module in `ENTRY_MODULES`,
or, in a package of your own, in an entry point of the group `cloudfs.nodes`.
"""

ENTRY_MODULES = (
    "connectors", "oslayers", "kernel_files", "net", "proc_tree", "process", "phys_maps", "procfs", "contents",
    "threads", "modules",
)  # fmt: skip
"""Modules here that register entries, in the order in which listings show them."""
