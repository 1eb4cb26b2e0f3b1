"""One function a command; each returns what `--json` prints and narrates the rest itself."""
