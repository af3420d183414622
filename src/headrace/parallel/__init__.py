"""Linears that own their sharding, their loading and their collectives."""
