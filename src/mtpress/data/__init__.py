"""Rows of text and conversations, from where they are kept."""
