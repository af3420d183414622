"""The HTTP server: an OpenAI-compatible application in front of a gateway, which keeps an instance alive."""
