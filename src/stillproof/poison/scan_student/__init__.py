"""Scanners of a student relative to its clean teacher, one a file. They see both and trusted images."""
