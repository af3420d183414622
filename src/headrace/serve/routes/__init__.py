"""The endpoints: each module makes a router over the served models."""
