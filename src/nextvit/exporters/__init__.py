"""Writing a folded model in another format, and proving that the file answers as the model does."""
