"""`Gateway`: requests in, deltas out, over an instance process that may die and come back.

It keeps the transcript of every request it has not finished, so that a new instance goes on from where the old one
was. It lives on one event loop and knows nothing of HTTP.
"""
