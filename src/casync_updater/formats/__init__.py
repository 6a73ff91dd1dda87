"""casync's own formats: index, chunk store, archive, mtree."""
