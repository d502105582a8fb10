"""Searching for settings: what is searched, the search itself, and what it leaves."""
