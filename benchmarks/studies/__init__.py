"""Studies: questions that were answered once, with the scripts that answer them again."""
