"""`python -m expunge`."""

from expunge.cli.main import entry

entry()
