"""The page that shows two models side by side."""
