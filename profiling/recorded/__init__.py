"""Recorded steps: what ran, where the time went, and how far from the limit. Start with step_page.py."""
