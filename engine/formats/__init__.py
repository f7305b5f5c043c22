"""Parsers of file formats, over a Memory or bytes."""
