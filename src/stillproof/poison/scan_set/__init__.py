"""Scanners of a transfer set, one a file. They see images, teacher and trusted set, never trigger or target."""
