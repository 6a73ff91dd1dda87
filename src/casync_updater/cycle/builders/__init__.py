"""The third room: the new tree, by the project's own extractor, or by casync."""
