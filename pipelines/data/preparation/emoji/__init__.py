"""Emoji scenes: drawings of many artists on photographs, with exact truth for naming, counting, pointing and moments of short clips."""
