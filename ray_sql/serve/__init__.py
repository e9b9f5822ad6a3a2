"""Use a tuned model: from the terminal (`ask`), over HTTP (`app`), and checked (`verify`).

`recipe` finds an adapter and the settings that it was trained with, `databases` what it is asked
about. `engine` answers questions, many together.
"""
