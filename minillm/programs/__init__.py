"""The command lines: flags -> library -> text."""
