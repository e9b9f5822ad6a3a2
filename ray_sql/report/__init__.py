"""Show results to people: figures, one page that needs nothing else, tables on a terminal."""
