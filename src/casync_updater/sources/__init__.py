"""Where releases and chunks come from."""
