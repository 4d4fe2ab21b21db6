"""The built-in synthetic benchmark."""
