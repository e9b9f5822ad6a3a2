"""Answers to verdicts and scores (`scoring`), of models (`measure`) or of a predictions file; two scored files compared (`compare`)."""
