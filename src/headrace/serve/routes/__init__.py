"""The endpoints: each module has a function that makes a router over the served models."""
