"""Files: memory, text, images of modules, and the files `new`."""
