"""The commands, one module or package each: `main(argv=None)` runs it."""
