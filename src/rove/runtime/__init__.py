"""Actors: objects in this process, in a child of it or on Ray, all called in the same typed way.

The ground floor. It imports nothing of Rove but its errors, and knows neither what the objects do nor how
they are configured.
"""
