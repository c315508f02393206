"""Data: sources and formats -> messages -> tokens and labels; viewer; synthetic tasks."""
