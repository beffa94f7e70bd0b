"""Images and audio of models that take them, through transformers' own processors and encoders."""
