"""The file system and the command line: memory as files."""
