"""Constraints as token masks, by llguidance."""
