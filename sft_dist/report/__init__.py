"""Report: what a finished run has to show, read from its directory alone."""
