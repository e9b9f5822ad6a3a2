"""Fine-tune small language models to answer questions in SQL, and measure them by executing it."""

__version__ = "0.1.0"
