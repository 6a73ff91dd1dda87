"""The publisher: build, sign, publish, prune."""
