"""The HTTP server: an OpenAI-compatible application in front of a gateway and its instances."""
